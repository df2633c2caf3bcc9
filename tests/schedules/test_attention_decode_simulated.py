"""The tensor-core decode kernel where there is no GPU: on the simulated one, against float64 attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rotquant_tvm.schedules import attention_decode_cuda
from rotquant_tvm.schedules.attention_decode_cuda import build

from rotquant_tvm.cache_policy import NO_POLICY, CachePolicy
from rotquant_tvm.formats import TileLayout
from rotquant_tvm.window_ring import WindowRing

from ..ops.cases import Case
from ..ops.conftest import Kernels
from ..ops.reference import attention, coefficients, filled_cache, stored_kv
from ..ops.segmented import SegmentedCache
from ..sampling import sampled
from .cuda_targets import target_of
from .simulated_decode import DecodeGPU
from .test_attention_decode_cuda import SCALE, SEGMENTED, check, expected_of, gentle_cache, shape_of

LENGTHS = np.array([0, 1, 33, 130], np.int32)
CASES = [
    (Case("hurwitz3", 128, 8, 2), "float16", {}),
    (Case("hurwitz3", 64, 5, 1), "float32", {"warps": 4, "stages": 1}),
    (Case("iso1/planar2", 80, 4, 2), "float16", {}),
    (Case("hurwitz4/hurwitz1", 96, 3, 3), "float16", {"stages": 3}),
    (Case("rotor3/rotor2", 80, 7, 1), "float32", {}),
    (Case("planar2/hurwitz4", 256, 2, 1), "float16", {}),
    (Case("turbo2/hurwitz3", 64, 13, 1), "float16", {}),
    (Case("f16", 64, 4, 4), "float16", {}),
    (Case("f16/hurwitz3", 96, 9, 1), "float32", {}),
    (Case("hurwitz4/f16", 80, 2, 1), "float16", {}),
    (Case("q8_0", 128, 4, 1), "float16", {}),
    (Case("q4_0/q8_0", 96, 5, 1), "float16", {}),
    (Case("q8_0/q4_0", 80, 2, 2), "float32", {}),
    (Case("iso3/q8_0", 64, 4, 1), "float16", {}),
    (Case("hurwitz3+tcq", 128, 8, 2), "float16", {"stages": 2}),
    (Case("iso2+tcq", 64, 5, 1), "float32", {}),
    (Case("planar4+tcq/hurwitz2+tcq", 80, 3, 1), "float16", {}),
    (Case("hurwitz2+tcq/turbo3", 64, 2, 2), "float16", {}),
    (Case("f16/hurwitz4+tcq", 64, 16, 1), "float32", {"warps": 12}),
    (Case("hurwitz3+tcq", 256, 7, 1), "float16", {}),
]
LONG = 2, 5, 8, 9, 13, 16, 17, 19
ORDINARY = [pytest.param(*case, marks=pytest.mark.full) if n in LONG else case for n, case in enumerate(CASES)]
"""Of the cases the ordinary run takes those that differ most."""


@pytest.fixture
def rng(request):
    """Random numbers of the test's own."""
    return np.random.default_rng(sum(request.node.name.encode()))


def simulate(shape, arrays, knobs=None, arch="sm_90a", blocks=24):
    """Run on a poisoned output; a GPU of few multiprocessors, so that streams have two or three splits."""
    return launch(shape, arrays, knobs, arch, blocks)[0]


def launch(shape, arrays, knobs=None, arch="sm_90a", blocks=24):
    """As ``simulate``; also how many blocks a stream had."""
    kernel = build(shape, target_of(arch), blocks=blocks, **{"warps": 4} | (knobs or {}))
    out, counters = np.full_like(arrays[0], np.nan), np.zeros(1 << 16, np.int32)
    gpu = DecodeGPU(kernel)
    gpu(*(np.ascontiguousarray(array) for array in arrays), counters, out)
    assert (counters == 0).all()
    return out.astype(np.float64), gpu.grid["blockIdx.y"]


@pytest.mark.parametrize(("case", "dtype", "knobs"), ORDINARY, ids=str)
def test_ragged_batches(rng, case, dtype, knobs):
    cache = filled_cache(rng, case.codecs, case.kv_heads, 6, LENGTHS)
    q = rng.standard_normal((4, 1, case.heads, case.head_dim)).astype(dtype)
    actual = simulate(shape_of(case, dtype), [q, cache, LENGTHS], knobs)
    check(actual, expected_of(case, q, cache, LENGTHS), 2e-3)


@pytest.mark.parametrize("window", [1, 40, 100])
def test_sliding_windows(rng, window):
    case = Case("hurwitz3", 64, 4, 2)
    cache = filled_cache(rng, case.codecs, case.kv_heads, 6, LENGTHS)
    q = rng.standard_normal((4, 1, 4, 64)).astype(np.float32)
    actual = simulate(shape_of(case, window=window), [q, cache, LENGTHS])
    check(actual, expected_of(case, q, cache, LENGTHS, window), 2e-3)


@pytest.mark.parametrize(
    ("case", "window", "arch"),
    [
        (Case("hurwitz3", 64, 4, 2), 70, "sm_90a"),
        pytest.param(Case("f16", 64, 2, 2), 33, "sm_80", marks=pytest.mark.full),
        pytest.param(Case("q8_0/iso2", 64, 4, 1), 1, "sm_90a", marks=pytest.mark.full),
    ],
    ids=str,
)
def test_rings_of_tiles(rng, case, window, arch):
    """Sequences of some and of many turns of a ring, which are not at the same place."""
    lengths, ring = np.array([0, 40, 171, 1003], np.int32), WindowRing(window)
    cache = filled_cache(rng, case.codecs, case.kv_heads, ring.tiles, np.full(4, ring.tokens))
    keys, values = stored_kv(case.codecs, cache)
    q = rng.standard_normal((4, 1, case.heads, 64)).astype(np.float32)
    actual = simulate(shape_of(case, window=window), [q, cache, lengths], arch=arch)
    for b, length in enumerate(lengths):
        seen = np.arange(max(0, length - window), length) % ring.tokens
        expected = np.zeros((1, case.heads, 64))
        if length:
            expected = attention(q[b], keys[b][:, seen], values[b][:, seen], SCALE, first=len(seen) - 1)
        check(actual[b], expected, 2e-3)


@pytest.mark.parametrize("window", [60, pytest.param(150, marks=pytest.mark.full)])
@pytest.mark.parametrize("site", sampled(SEGMENTED, SEGMENTED[1:2]), ids=str)
def test_rings_of_tiles_and_segments(rng, site, window):
    case, policy = site
    cache = SegmentedCache(Kernels("llvm"), rng, case, policy, 3, 900, window=window)
    assert cache.cache.shape[2] < policy.packed_tiles(900)
    for counts in ([70, 0, 33], [300, 40, 1], [1, 1, 400], [200, 1, 1]):
        cache.append(cache.draw(max(counts)), counts)
    q = rng.standard_normal((3, 1, case.heads, case.head_dim)).astype(np.float32)
    actual = simulate(shape_of(case, window=window, policy=policy), [q, *cache.arrays, cache.lengths])
    whole = cache.seen()
    for b, n in enumerate(cache.lengths):
        oldest = max(0, n - window)
        k, v = (whole[b, role, :, oldest:n] for role in range(2))
        check(actual[b], attention(q[b], k, v, SCALE, first=n - oldest - 1), 2e-3)


@pytest.mark.parametrize("pair", ["hurwitz3", "f16", "q8_0"])
def test_without_bulk_copies(rng, pair):
    """GPUs before sm_90 copy 16 bytes a lane."""
    case = Case(pair, 64, 4, 2)
    cache = gentle_cache(rng, case, 6, LENGTHS)
    q = rng.standard_normal((4, 1, 4, 64)).astype(np.float16)
    actual = simulate(shape_of(case, "float16"), [q, cache, LENGTHS], arch="sm_80")
    check(actual, expected_of(case, q, cache, LENGTHS), 1e-3)


@pytest.mark.parametrize(
    ("blocks", "knobs"),
    [(1, {}), (8, {}), (40, {}), (40, {"warps": 1, "least": 1})],
)
def test_the_number_of_splits_hardly_matters(rng, blocks, knobs):
    case = Case("hurwitz3", 64, 3, 1)
    lengths = np.array([700], np.int32)
    cache = gentle_cache(rng, case, 22, lengths)
    q = rng.standard_normal((1, 1, 3, 64)).astype(np.float32)
    actual = simulate(shape_of(case), [q, cache, lengths], knobs, blocks=blocks)
    check(actual, expected_of(case, q, cache, lengths), 1e-3)


def test_one_tile_in_flight(rng, monkeypatch):
    """What multiprocessors of two blocks are given of a ring of two stages."""
    monkeypatch.setattr(attention_decode_cuda, "multiprocessors", lambda target: 1)
    case, lengths = Case("hurwitz4", 128, 2, 1), np.array([700], np.int32)
    cache = gentle_cache(rng, case, 22, lengths)
    q = rng.standard_normal((1, 1, 2, 128)).astype(np.float32)
    actual = simulate(shape_of(case), [q, cache, lengths], {"warps": 8, "resident": 2}, blocks=2)
    check(actual, expected_of(case, q, cache, lengths), 1e-3)


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.full), 50])
@pytest.mark.parametrize(
    ("case", "policy"),
    [pytest.param(*case, marks=pytest.mark.full) if n in (0, 2, 3, 5) else case for n, case in enumerate(SEGMENTED)],
    ids=str,
)
def test_segments(rng, case, policy, window):
    check_segments(rng, case, policy, window)


@pytest.mark.parametrize(
    ("apart", "blocks", "expected"),
    [(3, 63, 7), (3, 62, 4), *(pytest.param(*found, marks=pytest.mark.full) for found in ((1, 45, 5), (0, 63, 4)))],
    ids=["three", "no_room", "one", "shared"],
)
@pytest.mark.parametrize("window", [None, pytest.param(50, marks=pytest.mark.full)])
def test_rows_in_blocks_of_their_own(rng, window, apart, blocks, expected):
    """Nine streams of four blocks with tiles: others have the rows in 16 bits, if they can run beside them."""
    knobs = {"warps": 2, "least": 1, "apart": apart}
    assert check_segments(rng, *SEGMENTED[1], window, knobs, blocks=blocks) == expected


@pytest.mark.parametrize(
    ("case", "arch"),
    [
        (Case("hurwitz3", 64, 9, 3), "sm_90a"),
        (Case("iso2/planar4", 80, 3, 1), "sm_80"),
        pytest.param(Case("hurwitz2+tcq", 64, 4, 2), "sm_90a", marks=pytest.mark.full),
        pytest.param(Case("hurwitz3/f16", 128, 6, 1), "sm_80", marks=pytest.mark.full),
    ],
    ids=str,
)
def test_centres_of_many_tiles(rng, case, arch):
    """More than two rounds of eight tiles to a warp, and rounds that are not full."""
    policy = CachePolicy(sinks=3, recent=5, center=32)
    cache = SegmentedCache(Kernels("llvm"), rng, case, policy, 3, 700)
    for counts in ([290, 30, 1], [300, 1, 0], [1, 240, 0]):
        cache.append(cache.draw(max(counts)), counts)
    q = rng.standard_normal((3, 1, case.heads, case.head_dim)).astype(np.float32)
    seen = cache.seen()
    expected = [
        attention(q[b], seen[b, 0, :, :n], seen[b, 1, :, :n], SCALE, first=n - 1) for b, n in enumerate(cache.lengths)
    ]
    knobs = {"warps": 1, "least": 100}
    actual, count = launch(shape_of(case, policy=policy), [q, *cache.arrays, cache.lengths], knobs, arch, blocks=1)
    assert count == 1
    check(actual, np.stack(expected), 2e-3)


def check_segments(rng, case, policy, window, knobs=None, **options):
    """Three sequences of different lengths, against float64 attention; returns how many blocks a stream had."""
    cache = SegmentedCache(Kernels("llvm"), rng, case, policy, 3, 300)
    for counts in ([70, 0, 33], [100, 40, 1], [1, 1, 1]):
        cache.append(cache.draw(max(counts)), counts)
    q = rng.standard_normal((3, 1, case.heads, case.head_dim)).astype(np.float32)
    shape = shape_of(case, window=window, policy=policy)
    seen = cache.seen()
    expected = [
        attention(q[b], seen[b, 0, :, :n], seen[b, 1, :, :n], SCALE, first=n - 1, window=window)
        for b, n in enumerate(cache.lengths)
    ]
    actual, count = launch(shape, [q, *cache.arrays, cache.lengths], knobs, **options)
    check(actual, np.stack(expected), 2e-3)
    return count


@pytest.mark.parametrize(
    ("case", "policy", "warps"),
    [
        (Case("hurwitz3", 128, 8, 2), NO_POLICY, 8),
        (Case("iso3/rotor2", 80, 11, 1), NO_POLICY, 4),
        (Case("hurwitz3", 64, 2, 1), CachePolicy(sinks=4, recent=8, center=64), 4),
    ],
    ids=str,
)
def test_raw_queries_and_outputs(rng, case, policy, warps):
    """The kernel rotates queries and un-rotates outputs itself."""
    lengths = np.array([1, 180], np.int32)
    key, value = case.codecs
    if policy.segmented:
        cache = SegmentedCache(Kernels("llvm"), rng, case, policy, 2, 256)
        cache.append(cache.draw(180), lengths)
        arrays, seen = [*cache.arrays, cache.lengths], cache.seen()
        keys, values = seen[:, 0], seen[:, 1]
    else:
        words = gentle_cache(rng, case, 6, lengths)
        arrays, (keys, values) = [words, lengths], stored_kv(case.codecs, words)
    q = rng.standard_normal((2, 1, case.heads, case.head_dim)).astype(np.float32)
    rotations = [coefficients(key.rotation), coefficients(value.inverse_rotation)]
    shape = replace(shape_of(case, policy=policy), rotated=True)
    actual = simulate(shape, [q, *arrays, *rotations], {"warps": warps})
    turned = key.rotation.apply(q.astype(np.float64))
    for b, n in enumerate(lengths):
        out = attention(turned[b], keys[b, :, :n], values[b, :, :n], SCALE, first=n - 1)
        check(actual[b], value.inverse_rotation.apply(out), 2e-3)


@pytest.mark.parametrize("distance", sampled([9, 13, 16, 18], [9, 18]))
def test_many_tokens_far_below_one(rng, distance):
    """A first token that takes 2^distance times the weight of each other one, whose values have a common mean."""
    case, tokens = Case("hurwitz4", 64, 1, 1), 1024
    key, value = case.codecs
    direction = np.zeros(64)
    direction[0] = 1
    keys = np.tile(direction, (tokens, 1)) * 1e-3
    keys[0] = direction
    values = rng.standard_normal((tokens, 64)) * 0.3 + rng.standard_normal(64)
    layout = TileLayout(key.format, value.format, 64)
    rows = [key.encode(key.unrotate(keys).reshape(1, 1, -1, 32, 64)), value.encode(values.reshape(1, 1, -1, 32, 64))]
    cache = np.ascontiguousarray(layout.pack(*rows)).view(np.uint32)
    lengths = np.array([tokens], np.int32)
    stored = stored_kv(case.codecs, cache)[0][0, 0]
    q = np.zeros((1, 1, 1, 64), np.float32)
    q[0, 0, 0] = stored[0] / (stored[0] @ stored[0]) * distance * np.log(2) / SCALE
    actual = simulate(shape_of(case), [q, cache, lengths], {"warps": 1}, blocks=1)
    check(actual, expected_of(case, q, cache, lengths), 2e-3)


def test_an_empty_sequence_beside_others_reads_no_row(rng):
    """Its 16-bit rows may never have been written."""
    case, policy = SEGMENTED[0]
    cache = SegmentedCache(Kernels("llvm"), rng, case, policy, 2, 300)
    cache.append(cache.draw(90), [90, 0])
    cache.plain[1] = np.nan
    q = rng.standard_normal((2, 1, case.heads, case.head_dim)).astype(np.float32)
    actual = simulate(shape_of(case, policy=policy), [q, *cache.arrays, cache.lengths])
    assert np.isfinite(actual).all() and (actual[1] == 0).all()
