"""Targets as users write them."""

from __future__ import annotations

import pytest
import tvm

from rotquant_tvm.errors import DeviceError, UsageError
from rotquant_tvm.target import host_target, resolve_target


def test_llvm_is_this_cpu():
    target = resolve_target("llvm")
    assert target.kind.name == "llvm" and target.attrs["mcpu"] == host_target().attrs["mcpu"] != ""


@pytest.mark.parametrize("text", ["llvm -mcpu=x86-64-v3 -num-cores=3", '{"kind": "llvm", "mcpu": "x86-64-v3"}'])
def test_options_and_json_are_understood(text):
    assert resolve_target(text).attrs["mcpu"] == "x86-64-v3"
    assert "3" not in text[-2:] or resolve_target(text).attrs["num-cores"] == 3


@pytest.mark.parametrize("text", ["nvidia/nvidia-h100", "cuda -arch=sm_90a -max_num_threads=1024"])
def test_a_gpu_gets_this_cpu_as_its_host(text):
    target = resolve_target(text)
    assert target.kind.name == "cuda" and target.attrs["arch"] == "sm_90a"
    assert target.host.kind.name == "llvm" and target.host.attrs["mcpu"] == host_target().attrs["mcpu"]


def test_targets_are_taken_as_they_are():
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2"})
    assert resolve_target(target).same_as(target)


@pytest.mark.parametrize("text", ["", "abacus", "llvm mcpu=x", "llvm -mcpu", "llvm -colour=red", "{", "vulkan", "c"])
def test_other_targets_are_refused_by_name(text):
    with pytest.raises(UsageError, match=f"'{text}'" if text else "target"):
        resolve_target(text)


@pytest.mark.skipif(tvm.cuda().exist, reason="there is a CUDA device here")
def test_cuda_without_a_device():
    with pytest.raises(DeviceError, match="sm_90a"):
        resolve_target("cuda")
