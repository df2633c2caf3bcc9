"""What targets ask of machines."""

from __future__ import annotations

import platform

import pytest
import tvm

from rotquant_tvm.runtime.requirements import machine_name
from rotquant_tvm.target import resolve_target
from rotquant_tvm.target_requirements import requirements

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the names are those of x86")


def test_this_cpu_has_what_its_own_target_needs():
    needs = requirements(resolve_target("llvm"))
    assert needs.machine == machine_name() and needs.cuda_arch is None
    needs.check_cpu("model.so")


@x86
def test_levels_need_what_they_are_made_of():
    level = {name: set(requirements(resolve_target(f"llvm -mcpu={name}")).cpu_features) for name in LEVELS}
    assert level["x86-64"] == set()
    assert {"sse4_2", "popcnt"} <= level["x86-64-v2"] < level["x86-64-v3"] < level["x86-64-v4"]
    assert {"avx2", "bmi2", "f16c", "fma"} <= level["x86-64-v3"]
    assert level["x86-64-v4"] - level["x86-64-v3"] == {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


LEVELS = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4")


def test_another_machine_is_named_by_its_triple():
    needs = requirements(tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "neoverse-v2"}))
    assert needs.machine == "aarch64" and needs.cpu == "neoverse-v2" and "sve2" in needs.cpu_features


@x86
def test_a_gpus_host_needs_nothing_special():
    needs = requirements(resolve_target("nvidia/nvidia-h100"), "cubin")
    assert (needs.cuda_arch, needs.cuda_code) == ("sm_90a", "cubin")
    assert needs.cpu_features == () and needs.machine == machine_name()
