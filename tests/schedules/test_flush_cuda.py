"""The flush kernel for CUDA: every test of the definition, the other element types, and machine code for each GPU."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.flush_cuda import KNOBS, flush_cuda, flush_kernel
from rotquant_tvm.schedules.knobs import with_knobs

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.ops.site_shape import SiteShape

from ..ops.cases import Case
from ..ops.conftest import has_gpu
from ..ops.conftest import rng as _rng
from ..ops.segmented import SegmentedCache
from ..ops.test_flush import (  # noqa: F401 (tests of the definition, collected here with other kernels)
    POLICIES,
    check_centres,
    check_state,
    test_a_full_cache_drops_what_has_no_tile,
    test_after_a_crop,
    test_chunks_then_single_tokens,
)
from ..sampling import sampled
from .cuda_targets import ARCHITECTURES, cubin, target_of
from .hand_laid_writers import HandLaidWriters

PRESET = CachePolicy(sinks=4, recent=64, center=64)
CASES = [
    Case("hurwitz3:ip/hurwitz3", 128, 2, 2),
    Case("hurwitz4:ip/hurwitz2", 256, 1, 1),
    Case("rotor1/q8_0", 80, 2, 2),
    Case("q8_0/rotor3", 80, 2, 2),
    Case("q4_0/turbo4", 64, 2, 2),
    Case("dense2/q4_0", 96, 2, 2),
]


rng = _rng


@pytest.fixture(scope="module")
def kernels():
    """The operators, those that write laid out by hand."""
    if not has_gpu():
        pytest.skip("no CUDA device")
    return HandLaidWriters()


def shape_of(case, policy, dtype="float16"):
    """The shape of a case's cache."""
    names = [codec.format.name for codec in case.codecs]
    return SiteShape(*names, case.heads, case.kv_heads, case.head_dim, 1.0, None, dtype, policy=policy.name)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_formats(kernels, rng, case, dtype):
    cache = SegmentedCache(kernels, rng, case, PRESET, 3, 420, dtype)
    for seq, counts, chunk in ((150, [150, 3, 70], True), (1, [1, 1, 1], False), (217, [217, 0, 65], False)):
        new = [x.astype(np.float16).astype(dtype) for x in cache.draw(seq)]
        before = cache.append(new, counts, chunk)
        check_state(cache, before)
    check_centres(cache)
    assert {ops.flush, ops.append_plain} <= kernels.laid_out


@pytest.mark.gpu
@pytest.mark.parametrize("knobs", [{name: value} for name, values in KNOBS.items() for value in values], ids=str)
def test_knobs(kernels, knobs):
    """Any number of warps gives the same bits."""
    case, results = CASES[0], []
    for chosen in (kernels, HandLaidWriters(**knobs)):
        cache = SegmentedCache(chosen, np.random.default_rng(5), case, CachePolicy(center=128), 2, 300, "float16")
        cache.append(cache.draw(290), [290, 131])
        results.append((cache.cache, cache.centre))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_declined():
    case = Case("rotor3+tcq/planar2+tcq", 80, 4, 2)
    assert flush_kernel(shape_of(case, PRESET), target_of("sm_90a")) is None
    case, huge = CASES[0], CachePolicy(center=1024)
    assert flush_kernel(shape_of(case, huge), target_of("sm_90a")) is None
    func = ops.flush(*case.codecs, 2, "float16", PRESET, ops.Axes("cuda"))
    assert flush_cuda(func, target_of("sm_90a")) is None
    assert flush_cuda(with_knobs(shape_of(case, PRESET).attach(func), {"warps": 2}), target_of("sm_90a")) is not None


@pytest.mark.parametrize("after", [0, 8])
def test_parameters_are_the_definitions(after):
    case = CASES[0]
    for policy in (PRESET, CachePolicy(recent=7)):
        func = ops.flush(*case.codecs, 2, "float16", policy, ops.Axes("cuda"), after=after)
        shape = SiteShape(**{**shape_of(case, policy).__dict__, "heads": after or 2})
        kernel = flush_cuda(shape.attach(func), target_of("sm_90a"))
        assert [p.name for p in kernel.params] == [p.name for p in func.params]


@pytest.mark.parametrize("arch", sampled(ARCHITECTURES, ["sm_90a"]))
@pytest.mark.parametrize("case", sampled(CASES[:3], CASES[:1]), ids=str)
@pytest.mark.parametrize("policy", [PRESET, POLICIES[0]], ids=lambda p: p.name)
def test_it_becomes_machine_code(arch, case, policy):
    assert cubin(lambda target: flush_kernel(shape_of(case, policy), target), arch)
