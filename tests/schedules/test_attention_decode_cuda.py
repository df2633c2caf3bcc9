"""The tensor-core decode kernel against float64 attention over the cache's own decoded keys and values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules.attention_decode_cuda import KNOBS, attention_decode_cuda, build, default_knobs

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import NO_POLICY, CachePolicy
from rotquant_tvm.codegen import bind_counters, compile_module
from rotquant_tvm.formats import TileLayout
from rotquant_tvm.ops.site_shape import SiteShape

from ..ops.cases import CASES as FORMAT_CASES
from ..ops.cases import Case
from ..ops.conftest import Kernels, has_gpu
from ..ops.reference import attention, coefficients, filled_cache, stored_kv
from ..ops.segmented import SegmentedCache
from .cuda_targets import ARCHITECTURES, cubin, target_of

SCALE = 0.09
LENGTHS = np.array([0, 1, 31, 32, 33, 64, 65, 257, 1021, 1024], np.int32)
CASES = [
    *(Case(f"hurwitz{bits}", head_dim, 8, 2) for bits in (1, 2, 3, 4) for head_dim in (64, 80, 96, 128, 256)),
    Case("iso3/planar4", 112, 6, 2),
    Case("turbo3/hurwitz2", 128, 7, 7),
    Case("turbo4:raw/rotor1:norm", 128, 9, 3),
    Case("hurwitz3", 128, 10, 2),
    Case("hurwitz3", 128, 8, 1),
    Case("hurwitz2/hurwitz4", 64, 13, 1),
    Case("hurwitz4", 256, 16, 1),
    Case("f16", 64, 4, 4),
    Case("f16", 128, 16, 2),
    Case("f16", 80, 22, 2),
    Case("f16/hurwitz3", 96, 5, 1),
    Case("hurwitz3/f16", 128, 12, 1),
    Case("q8_0", 128, 8, 2),
    Case("q4_0", 64, 8, 1),
    Case("q8_0/q4_0", 80, 6, 2),
    Case("q4_0/q8_0", 96, 5, 5),
    Case("q8_0/iso3-full", 96, 12, 2),
    Case("turbo4/q8_0", 256, 4, 1),
    *(Case(f"hurwitz{bits}+tcq", head_dim, 8, 2) for bits in (2, 3, 4) for head_dim in (48, 64, 80, 128, 256)),
    Case("hurwitz3+tcq", 128, 11, 1),
    Case("hurwitz2+tcq/planar4+tcq", 96, 6, 3),
    Case("hurwitz3+tcq/hurwitz3", 128, 16, 1),
    Case("hurwitz4/iso2+tcq", 112, 5, 5),
    Case("f16/hurwitz4+tcq", 64, 12, 2),
    Case("hurwitz3+tcq/q8_0", 96, 3, 1),
]
TRELLIS = Case("hurwitz3+tcq", 128, 8, 2)
SEGMENTED = [
    (Case("hurwitz3", 128, 8, 2), CachePolicy(sinks=4, recent=8, center=64)),
    (Case("hurwitz3", 64, 9, 3), CachePolicy(sinks=4, recent=32, center=64)),
    (Case("iso4/planar2", 80, 8, 2), CachePolicy(sinks=5, center=32)),
    (Case("rotor3/f16", 80, 3, 3), CachePolicy(sinks=40)),
    (Case("hurwitz2", 96, 12, 1), CachePolicy(recent=9)),
    (Case("q8_0/hurwitz3", 96, 7, 1), CachePolicy(sinks=4, recent=64)),
    (Case("turbo2", 128, 4, 2), CachePolicy(sinks=4, recent=3, center=96, defer=50)),
    (Case("hurwitz2+tcq", 64, 4, 2), CachePolicy(sinks=4, recent=8, center=64)),
]
RAW = [(case, NO_POLICY) for case in (Case("hurwitz3", 128, 8, 2), Case("iso3/rotor2", 80, 11, 1), TRELLIS)]
RAW += SEGMENTED[0], SEGMENTED[3], SEGMENTED[-1]
STEPS = ([70, 0, 3, 33], [130, 40, 1, 0], [1, 1, 1, 1], [64, 65, 1, 200])
KNOB_CASES = [{"warps": 8, "stages": 2, "blocks": 132}, {"warps": 4, "stages": 3, "blocks": 2000}, {"blocks": 1}]

requires_gpu = pytest.mark.skipif(not has_gpu(), reason="no CUDA device")


def shape_of(case, dtype="float32", window=None, policy=NO_POLICY):
    k, v = (codec.format.name for codec in case.codecs)
    return SiteShape(
        k, v, case.heads, case.kv_heads, case.head_dim, SCALE, window=window, dtype=dtype, policy=policy.name
    )


@pytest.fixture
def rng(request):
    """Random numbers of the test's own."""
    return np.random.default_rng(sum(request.node.name.encode()))


class Decode:
    """Compiled kernels for the GPU at hand, each once."""

    def __init__(self) -> None:
        self.kernels, self._known = Kernels("cuda"), {}

    def run(self, shape, arrays, knobs=()):
        """Run on a poisoned output."""
        key = shape, tuple(knobs)
        if key not in self._known:
            kernel = build(shape, self.kernels.target, **dict(knobs)).with_attr("global_symbol", "kernel")
            library = compile_module(tvm.IRModule({"kernel": kernel}), self.kernels.target)
            self._known[key] = bind_counters(library["kernel"], kernel)
        out = np.full_like(arrays[0], np.nan)
        results = [self.kernels.run(self._known[key], *arrays, out, writes=(-1,)) for _ in range(2)]
        np.testing.assert_array_equal(*results)  # the counters are as they were
        return results[0].astype(np.float64)


@pytest.fixture(scope="module")
def decode():
    return Decode()


def check(actual, expected, limit=1e-3):
    """Vector by vector."""
    assert np.isfinite(actual).all()
    error, size = (np.linalg.norm(x, axis=-1) for x in (actual - expected, expected))
    assert (error <= limit * size + 1e-6).all(), (error / (size + 1e-6)).max()


def expected_of(case, q, cache, lengths, window=None):
    keys, values = stored_kv(case.codecs, cache)
    out = np.zeros(q.shape)
    for b, n in enumerate(lengths):
        if n:
            out[b] = attention(q[b], keys[b, :, :n], values[b, :, :n], SCALE, first=n - 1, window=window)
    return out


def check_case(decode, rng, case, lengths=LENGTHS, tiles=32, dtype="float32", window=None, knobs=()):
    cache = filled_cache(rng, case.codecs, case.kv_heads, tiles, lengths)
    q = rng.standard_normal((len(lengths), 1, case.heads, case.head_dim)).astype(dtype)
    actual = decode.run(shape_of(case, dtype, window), [q, cache, lengths], knobs)
    check(actual, expected_of(case, q, cache, lengths, window), extreme_limit(case))


def extreme_limit(case):
    """For scores as high as those of random caches: q8_0 and q4_0 keys are rounded to float16, which moves them."""
    return 8e-3 if case.codecs[0].format.codebook == "linear" else 2e-3


def gentle_cache(rng, case, tiles, lengths):
    """A cache of keys and values all of norm √d, as attention of a trained model would see them."""
    layout = TileLayout(*(codec.format for codec in case.codecs), case.head_dim)
    shape = (len(lengths), case.kv_heads, tiles, 32, case.head_dim)
    return np.ascontiguousarray(
        layout.pack(*(codec.encode(rng.standard_normal(shape)) for codec in case.codecs))
    ).view(np.uint32)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ordinary_scores_to_one_in_a_thousand(decode, rng, case):
    lengths = np.array([33, 1000, 1023], np.int32)
    cache = gentle_cache(rng, case, 32, lengths)
    q = rng.standard_normal((3, 1, case.heads, case.head_dim)).astype(np.float32)
    actual = decode.run(shape_of(case), [q, cache, lengths])
    check(actual, expected_of(case, q, cache, lengths), 1e-3)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("case", "policy"), RAW, ids=str)
def test_raw_queries_and_outputs(decode, rng, case, policy, dtype):
    """The kernel rotates queries and un-rotates outputs itself."""
    lengths = np.array([1, 200, 1000], np.int32)
    key, value = case.codecs
    if policy.segmented:
        cache = SegmentedCache(Kernels("llvm"), rng, case, policy, 3, 1024)
        cache.append(cache.draw(1000), lengths)
        arrays, seen = [*cache.arrays, cache.lengths], cache.seen()
        keys, values = seen[:, 0], seen[:, 1]
    else:
        words = gentle_cache(rng, case, 32, lengths)
        arrays = [words, lengths]
        keys, values = stored_kv(case.codecs, words)
    q = rng.standard_normal((3, 1, case.heads, case.head_dim)).astype(dtype)
    rotations = [coefficients(key.rotation), coefficients(value.inverse_rotation)]
    shape = replace(shape_of(case, dtype, policy=policy), rotated=True)
    actual = decode.run(shape, [q, *arrays, *rotations])
    turned = key.rotation.apply(q.astype(np.float64))
    for b, n in enumerate(lengths):
        out = attention(turned[b], keys[b, :, :n], values[b, :, :n], SCALE, first=n - 1)
        check(actual[b], value.inverse_rotation.apply(out), 2e-3)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ragged_batches(decode, rng, case, dtype):
    check_case(decode, rng, case, dtype=dtype)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 7, 32, 40, 500])
@pytest.mark.parametrize("case", [Case("hurwitz3", 128, 8, 2), Case("f16", 64, 4, 2), TRELLIS], ids=str)
def test_sliding_windows(decode, rng, case, window):
    check_case(decode, rng, case, window=window)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("knobs", KNOB_CASES, ids=str)
@pytest.mark.parametrize("case", [Case("hurwitz3", 128, 8, 2), Case("f16/iso4", 80, 7, 1), TRELLIS], ids=str)
def test_knobs_do_not_change_the_result(decode, rng, case, knobs):
    check_case(decode, rng, case, knobs=tuple(knobs.items()))


@requires_gpu
@pytest.mark.gpu
def test_one_long_sequence_beside_short_ones(decode, rng):
    check_case(decode, rng, Case("hurwitz3", 128, 8, 2), np.array([1, 5000, 0, 3], np.int32), tiles=160)


@requires_gpu
@pytest.mark.gpu
def test_huge_scores(decode, rng):
    """One token far above or below all others: weights of 1 and 0, no overflow."""
    case, lengths = Case("hurwitz3", 128, 8, 2), np.array([70, 300], np.int32)
    cache = filled_cache(rng, case.codecs, case.kv_heads, 10, lengths)
    q = rng.standard_normal((2, 1, case.heads, case.head_dim)).astype(np.float32) * 2e3
    actual = decode.run(shape_of(case), [q, cache, lengths])
    check(actual, expected_of(case, q, cache, lengths), 5e-3)


@requires_gpu
@pytest.mark.gpu
def test_values_of_zero_count_in_the_sum(decode, rng):
    """Tokens whose value is zero still take their share of the weight, also where they come first."""
    case, lengths = Case("hurwitz3", 64, 4, 1), np.array([200, 64], np.int32)
    layout_cache = filled_cache(rng, case.codecs, 1, 7, lengths)
    gains = slice(2 * 3 * 64 + 16, 2 * 3 * 64 + 32)  # of V, in words
    layout_cache[:, :, :2, gains] = 0
    q = rng.standard_normal((2, 1, 4, 64)).astype(np.float32)
    actual = decode.run(shape_of(case), [q, layout_cache, lengths])
    check(actual, expected_of(case, q, layout_cache, lengths))
    assert (actual[1] == 0).all()


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("case", "policy"), SEGMENTED, ids=str)
def test_segments(decode, rng, case, policy, window):
    cache = SegmentedCache(Kernels("llvm"), rng, case, policy, 4, 600)
    for counts in STEPS:
        cache.append(cache.draw(max(counts)), counts)
    cache.append(cache.draw(1), np.ones(4), chunk=False)
    q = rng.standard_normal((4, 1, case.heads, case.head_dim)).astype(np.float32)
    actual = decode.run(shape_of(case, window=window, policy=policy), [q, *cache.arrays, cache.lengths])
    seen = cache.seen()
    expected = [
        attention(q[b], seen[b, 0, :, :n], seen[b, 1, :, :n], SCALE, first=n - 1, window=window)
        for b, n in enumerate(cache.lengths)
    ]
    check(actual, np.stack(expected))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("case", "policy"),
    [
        (CASES[7], NO_POLICY),
        (CASES[17], NO_POLICY),
        (Case("f16/hurwitz3", 96, 5, 1), NO_POLICY),
        (Case("q8_0/q4_0", 80, 6, 2), NO_POLICY),
        pytest.param(Case("hurwitz2+tcq/planar4+tcq", 80, 6, 3), NO_POLICY, marks=pytest.mark.full),
        SEGMENTED[2],
        SEGMENTED[-1],
    ],
    ids=str,
)
def test_compiles_to_a_cubin(case, policy, arch):
    assert cubin(lambda target: build(shape_of(case, "float16", policy=policy), target), arch)


def test_the_rule_takes_what_it_has_and_declines_the_rest():
    """A definition goes in, under its own name, with the knobs that it names."""
    target = target_of("sm_90a")
    for case in FORMAT_CASES:
        shape = shape_of(case)
        common = (*case.codecs, case.heads, case.kv_heads, SCALE, "float32", ops.Axes("cuda"))
        definition = shape.attach(ops.attention_decode(*common))
        kernel = attention_decode_cuda(definition, target)
        taken = all(codec.format.codebook in ("lloyd", "half", "linear", "trellis") for codec in case.codecs)
        assert (kernel is not None) == taken
        if kernel is not None:
            names = [str(p.name) for p in kernel.params if "arrivals" not in str(p.name)]
            assert names == [str(p.name) for p in definition.params]
    assert attention_decode_cuda(ops.attention_decode(*common), target) is None
    assert build(shape_of(FORMAT_CASES[0]), target) is not None
    assert build(replace(shape_of(FORMAT_CASES[0]), softcap=30.0), target) is None
    assert set(default_knobs(shape, target)) == set(KNOBS)
