"""What the rule of decode attention chooses, for GPUs that are not at hand."""

from __future__ import annotations

import pytest
from rotquant_tvm.schedules.attention_decode_cuda import _Kernel, build
from rotquant_tvm.schedules.decode_knobs_cuda import KNOBS, PROMISING, default_knobs

from rotquant_tvm.cache_policy import NO_POLICY, CachePolicy

from ..ops.cases import Case
from .cuda_targets import target_of
from .test_attention_decode_cuda import shape_of

POLICY = CachePolicy(sinks=4, recent=64, center=64)
MEMORY = {"sm_80": 164, "sm_86": 100, "sm_90a": 228}
"""KiB of shared memory of a multiprocessor, of which every block takes one besides its own."""


@pytest.mark.parametrize("arch", MEMORY)
@pytest.mark.parametrize("policy", [NO_POLICY, POLICY], ids=str)
@pytest.mark.parametrize("heads", [32, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("pair", ["hurwitz2+tcq", "hurwitz4+tcq", "iso3/planar2+tcq"])
def test_a_multiprocessor_holds_the_blocks_with_tables_that_it_is_given(pair, head_dim, heads, policy, arch):
    shape, target = shape_of(Case(pair, head_dim, heads, 8), "float16", policy=policy), target_of(arch)
    assert set(default_knobs(shape, target)) == set(KNOBS)
    kernel = _Kernel(shape, target, {})
    blocks = max(1, kernel.resident)
    assert kernel.fits
    assert blocks * (4 * kernel._words(kernel.stages) + 1024) <= 1024 * MEMORY[arch]


def test_two_tables_need_a_gpu_with_memory_for_them():
    shape = shape_of(Case("hurwitz3+tcq/hurwitz2+tcq", 128, 32, 8), "float16")
    assert build(shape, target_of("sm_86")) is None
    assert build(shape, target_of("sm_90a")) is not None


@pytest.mark.parametrize("recent", [8, 64, 512])
def test_three_warps_of_a_block_with_rows_have_any(recent):
    shape = shape_of(Case("hurwitz3", 128, 32, 8), "float16", policy=CachePolicy(sinks=4, recent=recent, center=64))
    apart, slots = default_knobs(shape, target_of("sm_90a"))["apart"], shape.cache_policy.slots
    assert 3 * 16 * (apart - 1) < slots <= 3 * 16 * apart
    assert default_knobs(shape_of(Case("hurwitz3", 128, 32, 8), "float16"), target_of("sm_90a"))["apart"] == 0


@pytest.mark.parametrize("policy", [NO_POLICY, POLICY], ids=str)
@pytest.mark.parametrize("case", [Case("hurwitz3", 128, 32, 8), Case("iso4/planar2", 64, 9, 3)], ids=str)
def test_what_a_search_tries_first_is_of_its_space_and_has_kernels(case, policy):
    for choice in PROMISING:
        assert list(choice) == list(KNOBS) and all(value in KNOBS[name] for name, value in choice.items())
        assert build(shape_of(case, "float16", policy=policy), target_of("sm_90a"), **choice) is not None
    assert len({tuple(choice.items()) for choice in PROMISING}) == len(PROMISING)
