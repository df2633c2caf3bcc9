"""Which device a target is, and how its folder is called."""

from __future__ import annotations

import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm.target import resolve_target
from rotquant_tvm.tuning.device_identity import X86_LEVELS, DeviceIdentity, cpu_levels, same_arch, slug_of


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("  Odd (TM) / name ", "odd-tm-name"),
    ],
)
def test_slugs(name, slug):
    assert slug_of(name) == slug


@given(st.text())
def test_a_slug_is_a_safe_folder_name(name):
    slug = slug_of(name)
    assert "/" not in slug and not slug.startswith((".", "-")) and slug == slug_of(slug)


def test_levels_include_those_below(llvm):
    names = [name for name, _ in X86_LEVELS]
    assert cpu_levels(llvm) == names[1:]
    for cpu, highest in (("x86-64", 3), ("x86-64-v2", 2), ("x86-64-v4", 0), ("skylake-avx512", 0), ("haswell", 1)):
        assert cpu_levels(resolve_target(f"llvm -mcpu={cpu}")) == names[highest:]


def test_a_cpu_is_named_by_its_level_not_by_its_model(llvm):
    identity = DeviceIdentity.of(llvm)
    assert (identity.slug, identity.kind, identity.arch) == ("llvm-x86-64-v3", "llvm", "x86-64-v3")
    assert identity.document()["attributes"]["threads"] >= 1


def test_architectures_are_alike_without_their_letter():
    assert same_arch("sm_90a", "sm_90") and same_arch("sm_100f", "sm_100a")
    assert not same_arch("sm_90", "sm_89") and not same_arch("", "")


@pytest.mark.gpu
@pytest.mark.skipif(not tvm.cuda(0).exist, reason="no CUDA device")
def test_the_gpu_at_hand():
    identity = DeviceIdentity.of(resolve_target("cuda"))
    assert identity.slug == slug_of(tvm.cuda(0).device_name) and identity.arch.startswith("sm_")
    assert identity.cuda.count(".") == 1 and identity.attributes["multiprocessors"] > 0
