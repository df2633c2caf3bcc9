"""The vector attention kernels for CPUs against NumPy in float64: formats, shapes, windows, instruction sets."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules.attention_decode_llvm import attention_decode_llvm
from rotquant_tvm.schedules.attention_prefill_llvm import attention_prefill_llvm
from rotquant_tvm.schedules.integer_stream_llvm import has_integer_core
from tvm.target import Target

from rotquant_tvm.formats import TileLayout, parse_pair
from rotquant_tvm.ops.site_shape import SiteShape
from rotquant_tvm.target import host_target

SCALE = 0.2
GENERIC = {"kind": "llvm"}
AVX2 = {"kind": "llvm", "mcpu": "x86-64-v3"}


def build(kernel, shape: SiteShape, target):
    """The compiled kernel."""
    target = host_target() if target is None else Target(target)
    mod = tvm.IRModule({"kernel": kernel(shape, target).with_attr("global_symbol", "kernel")})
    return tvm.compile(mod, target)["kernel"]


class Cache:
    """A random packed cache and what it holds, in float64 [batch, kv_heads, tokens, head_dim]."""

    def __init__(self, pair: str, head_dim: int, batch: int, kv_heads: int, tiles: int) -> None:
        self.rng = np.random.default_rng(hash((pair, head_dim, tiles)) % 2**32)
        self.formats = parse_pair(pair)
        codecs = [f.codec(head_dim, seed=i) for i, f in enumerate(self.formats)]
        layout = TileLayout(*self.formats, head_dim)
        encoded = [c.encode(self.rng.standard_normal((batch, kv_heads, tiles, 32, head_dim))) for c in codecs]
        self.words = np.ascontiguousarray(layout.pack(*encoded)).view("uint32")
        flat = (batch, kv_heads, tiles * 32, head_dim)
        self.k, self.v = (c.decode_rotated(e).reshape(flat) for c, e in zip(codecs, encoded, strict=True))

    def shape(self, group: int, **options) -> SiteShape:
        kv_heads, head_dim = self.k.shape[1], self.k.shape[3]
        names = [f.name for f in self.formats]
        options = {"window": None, "dtype": "float32"} | options
        return SiteShape(*names, kv_heads * group, kv_heads, head_dim, SCALE, **options)


def attend(q, k, v, softcap=None):
    """One query [d] over keys and values [n, d], in float64."""
    score = k @ q.astype(np.float64) * SCALE
    score = softcap * np.tanh(score / softcap) if softcap else score
    weight = np.exp(score - score.max())
    return weight / weight.sum() @ v


def run(kernel, out, *arrays):
    """Run on a poisoned output and return it."""
    result = tvm.runtime.tensor(np.full_like(out, np.nan))
    kernel(*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays), result)
    return result.numpy().astype(np.float64)


def tolerance(shape: SiteShape, target) -> float:
    """How far an output may be from float64, relative to its length: integers of 15 bits, or float32."""
    target = host_target() if target is None else Target(target)
    return 5e-4 if has_integer_core(shape.codecs(), target) else 2e-6


CASES = [
    # K/V, head_dim, kv_heads, group, splits, window, target
    ("hurwitz3", 64, 3, 3, 2, None, None),
    ("hurwitz3", 64, 1, 3, 2, None, AVX2),
    ("turbo4/planar2", 128, 2, 8, 3, 40, None),
    ("iso4/planar2", 128, 1, 4, 3, None, AVX2),
    ("rotor3/q8_0", 80, 2, 7, 1, None, None),
    ("rotor1/f16", 80, 2, 1, 9, None, None),
    ("bf16/turbo2", 256, 1, 16, 2, None, None),
    ("q8_0/hurwitz1", 96, 2, 5, 2, 33, None),
    ("f16", 64, 2, 2, 2, None, GENERIC),
    ("q8_0/q4_0", 80, 2, 3, 2, None, None),
    ("q4_0/q8_0", 96, 1, 2, 2, None, AVX2),
    ("turbo2.5/turbo3.5", 64, 2, 3, 2, None, None),
    ("turbo3.5/dense2.5", 128, 1, 2, 2, None, AVX2),
    ("dense2.5/dense3.5", 32, 1, 2, 2, None, GENERIC),
    ("hurwitz3+tcq", 64, 1, 3, 2, None, None),
    ("hurwitz2+tcq/turbo4+tcq:norm", 128, 1, 2, 2, None, None),
    ("rotor3+tcq/rotor2+tcq", 80, 1, 2, 2, None, None),
    ("hurwitz4+tcq/hurwitz3+tcq", 256, 1, 1, 2, None, AVX2),
    ("rotor3+tcq", 80, 1, 2, 2, None, AVX2),
    ("planar2+tcq/hurwitz4", 64, 1, 2, 2, None, GENERIC),
]


@pytest.mark.parametrize(("pair", "head_dim", "kv_heads", "group", "splits", "window", "target"), CASES)
def test_decode(pair, head_dim, kv_heads, group, splits, window, target):
    lengths = np.array([45, 33, 32, 31, 1, 0, 200], "int32")
    cache = Cache(pair, head_dim, len(lengths), kv_heads, 7)
    shape = cache.shape(group, splits=splits, window=window)
    kernel, most = build(attention_decode_llvm, shape, target), tolerance(shape, target)
    q = cache.rng.standard_normal((len(lengths), 1, kv_heads * group, head_dim)).astype("float32")
    out = run(kernel, q, q, cache.words, lengths)
    for b, length in enumerate(lengths):
        first = max(0, length - window) if window else 0
        for head in range(kv_heads * group):
            expected = np.zeros(head_dim)
            if length:
                past = slice(first, length)
                expected = attend(q[b, 0, head], cache.k[b, head // group, past], cache.v[b, head // group, past])
            assert np.linalg.norm(out[b, 0, head] - expected) <= most * max(np.linalg.norm(expected), 1e-3), (b, head)


PREFILL = [
    # K/V, head_dim, kv_heads, group, past, new, window, target
    ("hurwitz3", 64, 3, 3, (45, 37, 0, 1), (10, 3, 45, 33), None, None),
    ("f16/q8_0", 80, 2, 7, (0, 33), (33, 1), None, None),
    ("iso4/planar2", 128, 1, 8, (100, 64), (20, 64), 20, None),
    ("rotor3", 80, 2, 1, (45, 33), (35, 0), None, AVX2),
    ("bf16/turbo2", 256, 1, 4, (45, 33), (5, 6), 40, None),
    ("hurwitz3", 64, 1, 1, (70,), (65,), None, GENERIC),
]


@pytest.mark.parametrize(("pair", "head_dim", "kv_heads", "group", "past", "new", "window", "target"), PREFILL)
def test_prefill(pair, head_dim, kv_heads, group, past, new, window, target):
    past, new = np.array(past, "int32"), np.array(new, "int32")
    cache = Cache(pair, head_dim, len(past), kv_heads, int(max(past + new)) // 32 + 1)
    kernel = build(attention_prefill_llvm, cache.shape(group, chunk=True, window=window), target)
    seq = max(new)
    q = cache.rng.standard_normal((len(past), seq, kv_heads * group, head_dim)).astype("float32")
    k, v = (cache.rng.standard_normal((len(past), kv_heads, seq, head_dim)).astype("float32") for _ in "kv")
    out = run(kernel, q, q, k, v, cache.words, past + new, new)
    for b in range(len(past)):
        assert not out[b, new[b] :].any()
        for row in range(new[b]):
            for head in range(kv_heads * group):
                kv = head // group
                keys = np.concatenate([cache.k[b, kv, : past[b]], k[b, kv, : row + 1]])[-window if window else 0 :]
                values = np.concatenate([cache.v[b, kv, : past[b]], v[b, kv, : row + 1]])[-window if window else 0 :]
                expected = attend(q[b, row, head], keys, values)
                assert np.linalg.norm(out[b, row, head] - expected) <= 4e-6 * np.linalg.norm(expected), (b, row, head)


@pytest.mark.parametrize(("softcap", "target"), [(0.4, None), (30.0, AVX2)])
def test_soft_capped_scores(softcap, target):
    """A cap that nearly all scores exceed, and one that bends the largest a little."""
    cache = Cache("hurwitz3", 64, 2, 1, 3)
    q = cache.rng.standard_normal((2, 1, 3, 64)).astype("float32") * 3
    lengths = np.array([77, 5], "int32")
    shape = cache.shape(3, splits=2, softcap=softcap)
    kernel, most = build(attention_decode_llvm, shape, target), max(1e-5, tolerance(shape, target))
    out = run(kernel, q, q, cache.words, lengths)
    new = np.ones(2, "int32")
    chunk = [x[:, :, lengths[0] - 1 :][:, :, :1].astype("float32") for x in (cache.k, cache.v)]
    kernel = build(attention_prefill_llvm, cache.shape(3, chunk=True, softcap=softcap), target)
    later = run(kernel, q, q, *chunk, cache.words, lengths, new)
    for b, n in enumerate(lengths):
        for head in range(3):
            expected = attend(q[b, 0, head], cache.k[b, 0, :n], cache.v[b, 0, :n], softcap)
            assert np.linalg.norm(out[b, 0, head] - expected) <= most * np.linalg.norm(expected)
            keys, values = (
                np.concatenate([x[b, 0, : n - 1], y[b, 0]]) for x, y in zip((cache.k, cache.v), chunk, strict=True)
            )
            expected = attend(q[b, 0, head], keys, values, softcap)
            assert np.linalg.norm(later[b, 0, head] - expected) <= 1e-5 * np.linalg.norm(expected)


def test_garbage_past_the_end_is_ignored():
    """Rows that are no real tokens may hold NaN, and the open tile whatever a crop left."""
    cache = Cache("hurwitz3", 64, 1, 1, 3)
    new = np.array([5], "int32")
    kernel = build(attention_prefill_llvm, cache.shape(2, chunk=True), None)
    q, k, v = (cache.rng.standard_normal(s).astype("float32") for s in ((1, 9, 2, 64), (1, 1, 9, 64), (1, 1, 9, 64)))
    clean = run(kernel, q, q, k, v, cache.words, new + 40, new)
    q[:, 5:], k[:, :, 5:], v[:, :, 5:] = np.nan, np.nan, np.nan
    cache.words[:, :, 2:] = 0xFFFFFFFF
    np.testing.assert_array_equal(run(kernel, q, q, k, v, cache.words, new + 40, new), clean)


def test_half_precision_queries():
    cache = Cache("hurwitz4", 64, 2, 2, 4)
    kernel = build(attention_decode_llvm, cache.shape(3, splits=2, dtype="float16"), None)
    q = cache.rng.standard_normal((2, 1, 6, 64)).astype("float16")
    lengths = np.array([100, 7], "int32")
    out = run(kernel, q, q, cache.words, lengths)
    expected = np.zeros(q.shape)
    for b, n in enumerate(lengths):
        for head in range(6):
            expected[b, 0, head] = attend(q[b, 0, head], cache.k[b, head // 3, :n], cache.v[b, head // 3, :n])
    assert np.linalg.norm(out - expected) <= 1e-3 * np.linalg.norm(expected)
