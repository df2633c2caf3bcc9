"""The append kernel of the 16-bit segments for CUDA: every test of the definition, and machine code for each GPU."""

from __future__ import annotations

import pytest
from rotquant_tvm.schedules.append_plain_cuda import append_plain_cuda, append_plain_kernel

from rotquant_tvm import ops
from rotquant_tvm.ops.site_shape import SiteShape

from ..ops.conftest import has_gpu
from ..ops.conftest import rng as _rng
from ..ops.test_append_plain import (  # noqa: F401 (tests of the definition, collected here with other kernels)
    POLICIES,
    test_each_token_enters_its_slot,
    test_values_are_stored_as_16_bit_formats_store_them,
)
from .cuda_targets import ARCHITECTURES, cubin, target_of
from .hand_laid_writers import HandLaidWriters

rng = _rng
WORDS = 800
"""Of a tile."""


@pytest.fixture(scope="module")
def kernels():
    """The operators, those that write laid out by hand."""
    if not has_gpu():
        pytest.skip("no CUDA device")
    return HandLaidWriters()


def shape_of(policy, dtype="float16"):
    """The shape of a cache with this policy."""
    return SiteShape("hurwitz3", "hurwitz3", 8, 2, 128, 1.0, None, dtype, policy=policy.name)


def test_a_definition_without_a_shape_is_declined():
    func = ops.append_plain(2, 128, WORDS, "float16", POLICIES[0], ops.Axes("cuda"))
    assert append_plain_cuda(func, target_of("sm_90a")) is None
    kernel = append_plain_cuda(shape_of(POLICIES[0]).attach(func), target_of("sm_90a"))
    assert [p.name for p in kernel.params] == [p.name for p in func.params]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("policy", POLICIES[::3], ids=lambda p: p.name)
def test_it_becomes_machine_code(arch, dtype, policy):
    assert cubin(lambda target: append_plain_kernel(shape_of(policy, dtype), target, WORDS), arch)
