"""The append kernel of the 16-bit segments for CUDA: every test of the definition, and machine code for each GPU."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.append_plain_cuda import append_plain_cuda, append_plain_kernel

from rotquant_tvm import ops
from rotquant_tvm.ops.site_shape import SiteShape

from ..ops.conftest import has_gpu
from ..ops.conftest import rng as _rng
from ..ops.test_append_plain import (  # noqa: F401 (tests of the definition, collected here with other kernels)
    POLICIES,
    expected,
    test_each_token_enters_its_slot,
    test_values_are_stored_as_16_bit_formats_store_them,
)
from .cuda_targets import ARCHITECTURES, cubin, target_of
from .hand_laid_writers import HandLaidWriters
from .simulated_gpu import SimulatedGPU, cuda_target

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


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("seq", [1, 29, 150])
def test_slots_on_the_simulated_gpu(rng, policy, seq):
    """Ragged rows that begin anywhere; of more tokens than slots, the newest of each slot."""
    counts = np.array([seq, 0, (seq + 1) // 2, min(seq, 2)], np.int32)
    lengths = counts + np.array([0, 37, 61, policy.sinks], np.int32)
    packed = policy.packed_after(np.zeros(4, np.int32), lengths, True)
    new = [rng.standard_normal((4, 2, seq, 128)).astype(np.float16) for _ in range(2)]
    plain = rng.standard_normal((4, 2, 2, policy.slots, 128)).astype(np.float16)
    wanted = expected(policy, plain, new, packed, lengths, counts)
    tiles = np.zeros((4, 2, 1, WORDS), np.uint32)
    SimulatedGPU(append_plain_kernel(shape_of(policy), cuda_target(), WORDS))(
        plain, *new, packed, lengths, counts, tiles
    )
    np.testing.assert_array_equal(plain, wanted)


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
