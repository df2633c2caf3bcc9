"""Kernels that start before the one before them has ended: which are launched so."""

from __future__ import annotations

import pytest
import tvm
from rotquant_tvm.schedules import dependent_launch_cuda
from rotquant_tvm.schedules.attention_decode_cuda import build
from rotquant_tvm.schedules.dependent_launch_cuda import starts_early
from rotquant_tvm.schedules.rms_norm_cuda import rms_norm

from rotquant_tvm import codegen
from rotquant_tvm.ops.site_shape import SiteShape

from .cuda_targets import target_of

EARLY_START = "tirx.use_programtic_dependent_launch"
"""The parameter that TVM's launches have for it, as TVM spells it."""


def test_new_gpus_have_such_launches():
    assert starts_early(target_of("sm_90a"))


def test_old_gpus_have_no_such_launches():
    assert starts_early(target_of("sm_90a")) and not starts_early(target_of("sm_80"))


@pytest.mark.parametrize("early", [False, True])
def test_a_kernel_that_waits_is_launched_early(early, monkeypatch):
    monkeypatch.setattr(dependent_launch_cuda, "BY_DEFAULT", early)
    target = target_of("sm_90a")
    kernel = rms_norm(64, 1e-5, 1, target).with_attr("global_symbol", "kernel")
    assert started_early(kernel, target, monkeypatch) == early


def test_decode_attention_lets_its_successor_start_and_starts_in_its_turn(monkeypatch):
    target = target_of("sm_90a")
    kernel = build(SiteShape("hurwitz3", "hurwitz3", 8, 2, 128, 0.1, None, "float16"), target)
    assert not started_early(kernel.with_attr("global_symbol", "kernel"), target, monkeypatch)


def started_early(kernel, target, monkeypatch):
    """Whether the launch of the compiled kernel says so; those that do are the ones that wait."""
    lowered, mark = [], codegen._with_early_starts
    monkeypatch.setattr(codegen, "_with_early_starts", lambda mod: lowered.append(mark(mod)) or lowered[-1])
    code = codegen.compile_module(tvm.IRModule({"kernel": kernel}), target).mod.imports[0]
    launches = [func.attrs.get("tirx.kernel_launch_params") for mod in lowered for _, func in mod.functions_items()]
    (launch,) = (list(map(str, tags)) for tags in launches if tags is not None)
    assert (EARLY_START in launch) == ("griddepcontrol.wait" in code.inspect_source())
    return EARLY_START in launch
