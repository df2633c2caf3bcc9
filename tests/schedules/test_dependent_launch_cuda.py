"""Kernels that start before the one before them has ended: which are launched so."""

from __future__ import annotations

import pytest
import tvm
from rotquant_tvm.schedules import dependent_launch_cuda
from rotquant_tvm.schedules.dependent_launch_cuda import starts_early
from rotquant_tvm.schedules.rms_norm_cuda import rms_norm

from rotquant_tvm.codegen import compile_module

from .cuda_targets import target_of


def test_new_gpus_have_such_launches():
    assert starts_early(target_of("sm_90a"))


def test_old_gpus_have_no_such_launches(monkeypatch):
    monkeypatch.setattr(dependent_launch_cuda, "BY_DEFAULT", True)
    assert starts_early(target_of("sm_90a")) and not starts_early(target_of("sm_80"))


@pytest.mark.parametrize("early", [False, True])
def test_a_kernel_that_waits_is_launched_early(early, monkeypatch):
    monkeypatch.setattr(dependent_launch_cuda, "BY_DEFAULT", early)
    target = target_of("sm_90a")
    kernel = rms_norm(64, 1e-5, 1, target).with_attr("global_symbol", "kernel")
    code = compile_module(tvm.IRModule({"kernel": kernel}), target).mod.imports[0]
    assert ("griddepcontrol.wait" in code.inspect_source()) == early
