"""The tensor-core prefill kernel against float64 attention over the cache's own decoded keys and values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules.attention_prefill_cuda import KNOBS, attention_prefill_cuda, prefill_kernel
from rotquant_tvm.schedules.knobs import with_knobs
from rotquant_tvm.schedules.prefill_tiling_cuda import prefill_tiling

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import NO_POLICY, CachePolicy
from rotquant_tvm.codegen import compile_module

from ..ops.cases import CASES as FORMAT_CASES
from ..ops.cases import Case
from ..ops.conftest import Kernels, has_gpu
from ..ops.reference import attention, filled_cache
from ..ops.test_attention_prefill import RAGGED, chunk, expected
from .cuda_targets import ARCHITECTURES, cubin, target_of
from .prefill_problems import SCALE, check_output, segmented, shape_of, straight

CASES = [
    *(Case(f"hurwitz{bits}", head_dim, 8, 2) for bits in (1, 2, 3, 4) for head_dim in (64, 80, 96, 128, 256)),
    *FORMAT_CASES,
    Case("hurwitz3", 32, 3, 1),
    Case("iso3/planar4", 112, 6, 2),
    Case("hurwitz2/planar4", 160, 10, 2),
    Case("q8_0", 128, 8, 2),
    Case("q4_0", 128, 8, 2),
    Case("f16", 128, 32, 8),
    Case("bf16", 256, 4, 1),
    Case("rq2", 128, 8, 2),
]
SEGMENTED = [
    (Case("hurwitz3", 128, 8, 2), CachePolicy(sinks=4, recent=64, center=64)),
    (Case("hurwitz3", 64, 9, 3), CachePolicy(sinks=4, recent=32, center=64)),
    (Case("iso4/planar2", 80, 8, 2), CachePolicy(sinks=5, center=32)),
    (Case("q8_0/hurwitz3", 96, 7, 1), CachePolicy(recent=9)),
    (Case("rotor3/f16", 80, 3, 3), CachePolicy(sinks=40)),
    (Case("turbo2", 128, 4, 2), CachePolicy(sinks=4, recent=3, center=96, defer=50)),
    (Case("hurwitz4", 256, 4, 2), CachePolicy(sinks=4, recent=64, center=64)),
]
STEPS = ([70, 0, 3, 33, 0], [130, 40, 1, 0, 0], [1, 1, 1, 1, 0], [64, 65, 1, 200, 0])
ROTATED = [
    *(Case("hurwitz3", head_dim, 8, 2) for head_dim in (64, 80, 96, 128, 256)),
    Case("iso3", 128, 32, 8),
    Case("planar2/turbo4", 64, 5, 1),
    Case("rotor3", 112, 6, 2),
    Case("dense4/iso2", 80, 4, 4),
    Case("hurwitz3/q8_0", 96, 8, 2),
    Case("bf16/hurwitz2", 128, 7, 1),
    Case("f16/turbo2", 256, 4, 1),
    Case("hurwitz3+tcq", 128, 8, 2),
]
KNOB_CASES = [
    {"tokens": 64, "stages": 1},
    {"tokens": 64, "stages": 2},
    {"row_tiles": 1},
    {"warps": 8},
    {"warps": 2, "row_tiles": 1},
    {"warps": 8, "row_tiles": 1, "tokens": 128, "stages": 1},
]
LONG = [(0, 300), (129, 257), (517, 64), (1000, 1), (65, 0), (63, 131)]

requires_gpu = pytest.mark.skipif(not has_gpu(), reason="no CUDA device")


@pytest.fixture
def rng(request):
    """Random numbers of the test's own."""
    return np.random.default_rng(sum(request.node.name.encode()))


@pytest.fixture(scope="module")
def gpu():
    return Kernels("cuda")


@pytest.fixture(scope="module")
def cpu():
    return Kernels("llvm")


def compiled(gpu, shape, **knobs):
    kernel = prefill_kernel(shape, gpu.target, **knobs)
    return compile_module(tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")}), gpu.target)["kernel"]


def solve(gpu, problem, **knobs):
    """Run a problem on a poisoned output; rows of padding must come out as 0."""
    output = np.full_like(problem.arguments[0], np.nan)
    actual = gpu.run(compiled(gpu, problem.shape, **knobs), *problem.arguments, output, writes=(-1,))
    check_output(actual, problem.wanted, problem.explain)
    assert (actual[(problem.wanted == 0).all(axis=(2, 3))] == 0).all()


def check(gpu, rng, case, steps, window=None, rotated=False, **knobs):
    solve(gpu, straight(rng, case, steps, window, rotated), **knobs)


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ragged_chunks(gpu, rng, case):
    check(gpu, rng, case, RAGGED + LONG[:3])


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("window", [1, 7, 32, 40, 200])
@pytest.mark.parametrize("case", [Case("hurwitz3", 128, 8, 2), Case("iso4/planar2", 80, 5, 5)], ids=str)
def test_sliding_windows(gpu, rng, case, window):
    check(gpu, rng, case, RAGGED + LONG, window=window)


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("knobs", KNOB_CASES, ids=str)
@pytest.mark.parametrize("case", [Case("hurwitz3", 128, 8, 2), Case("q8_0/iso3", 80, 7, 1)], ids=str)
def test_every_tiling_gives_the_same(gpu, rng, case, knobs):
    check(gpu, rng, case, RAGGED + LONG, **knobs)


@pytest.mark.gpu
@requires_gpu
def test_a_past_beyond_the_capacity_is_not_read(gpu, rng):
    case, past, new = CASES[2], np.array([64, 70, 100_000], np.int32), np.array([3, 3, 3], np.int32)
    cache = filled_cache(rng, case.codecs, case.kv_heads, 2, [64, 64, 64])
    q, k, v = chunk(rng, case, new, "float16")
    kernel = compiled(gpu, shape_of(case))
    actual = gpu.run(kernel, q, k, v, cache, past + new, new, np.full_like(q, np.nan), writes=(6,))
    check_output(actual, expected(case, q, k, v, cache, [64, 64, 64], new))


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("window", [None, 50, 230])
@pytest.mark.parametrize(("case", "policy"), SEGMENTED, ids=str)
def test_policies(gpu, cpu, rng, case, policy, window, rotated):
    solve(gpu, segmented(cpu, rng, case, policy, STEPS, [40, 7, 0, 200, 90], window, rotated))


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("case", ROTATED, ids=str)
def test_changes_of_basis(gpu, rng, case):
    check(gpu, rng, case, RAGGED + LONG, rotated=True)


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("window", [1, 40, 200])
def test_changes_of_basis_with_windows(gpu, rng, window):
    check(gpu, rng, Case("hurwitz3", 128, 8, 2), RAGGED + LONG, window=window, rotated=True)


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("knobs", KNOB_CASES, ids=str)
@pytest.mark.parametrize("case", [Case("hurwitz3", 128, 8, 2), Case("iso3/planar2", 80, 7, 1)], ids=str)
def test_changes_of_basis_with_every_tiling(gpu, rng, case, knobs):
    check(gpu, rng, case, RAGGED + LONG, rotated=True, **knobs)


@pytest.mark.gpu
@requires_gpu
def test_large_scores_do_not_overflow(gpu, rng):
    """Peaks move late and far: keys grow along the sequence."""
    case, n = Case("f16", 128, 4, 1), 300
    q, k, v = chunk(rng, case, [n], "float16")
    k *= np.linspace(0, 12, n, dtype=np.float16)[:, None]
    cache = filled_cache(rng, case.codecs, 1, 1, [0])
    lengths = np.array([n], np.int32)
    kernel = compiled(gpu, shape_of(case))
    actual = gpu.run(kernel, q, k, v, cache, lengths, lengths, np.full_like(q, np.nan), writes=(6,))
    check_output(actual[0], attention(q[0], k[0], v[0], SCALE))


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "case",
    [Case("hurwitz3", 128, 32, 8), Case("q8_0/bf16", 80, 7, 1), Case("hurwitz4/f16", 256, 4, 4)],
    ids=str,
)
def test_kernels_compile(case, arch):
    for policy in (NO_POLICY, CachePolicy(sinks=4, recent=64, center=64)):
        shape = shape_of(case, window=100, policy=policy, rotated=policy is not NO_POLICY)
        assert len(cubin(lambda target, shape=shape: prefill_kernel(shape, target), arch)) > 0


@pytest.mark.parametrize("shared", [49152, 101376, 166912, 232448])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_blocks_fit_the_shared_memory_there_is(head_dim, shared):
    tiling = prefill_tiling(head_dim, (25 * head_dim, 0, 0), shared, {})
    if (head_dim, shared) == (256, 49152):
        assert tiling is None
    else:
        assert tiling is not None and 2 * tiling.size <= shared
    wide = prefill_tiling(head_dim, (25 * head_dim, 0, 0), shared, {"warps": 8, "tokens": 128, "stages": 2})
    assert wide is None or (2 * wide.size <= shared and (wide.warps, wide.tokens) == (8, 128))


def definition(case, dtype="float16"):
    shape = shape_of(case, dtype)
    func = ops.attention_prefill(*case.codecs, case.heads, case.kv_heads, SCALE, dtype, ops.Axes("cuda"))
    return shape.attach(func)


def test_the_rule_declines_what_it_has_no_kernel_for():
    case = Case("hurwitz3", 128, 8, 2)
    assert attention_prefill_cuda(definition(case), target_of("sm_90a")) is not None
    assert attention_prefill_cuda(definition(case, "float32"), target_of("sm_90a")) is None
    assert attention_prefill_cuda(definition(case), target_of("sm_75")) is None
    capped = replace(shape_of(case), softcap=30.0).attach(definition(case))
    assert attention_prefill_cuda(capped, target_of("sm_90a")) is None


def test_knobs_on_the_definition_replace_the_rules_choice():
    func = definition(Case("hurwitz3", 128, 8, 2))
    plain, changed = (attention_prefill_cuda(with_knobs(func, k), target_of("sm_90a")) for k in ({}, {"warps": 2}))
    assert KNOBS["warps"] == (2, 4, 8)
    assert str(plain) != str(changed)
