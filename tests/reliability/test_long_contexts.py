"""Contexts beyond 100,000 tokens and caches beyond 4 GiB, against NumPy: no offset is cut to 32 bits."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tvm
from torch.utils.dlpack import from_dlpack

from rotquant_tvm.formats import TOKENS, TileLayout
from rotquant_tvm.integrations.attention_geometry import AttentionGeometry, layer_rotations
from rotquant_tvm.integrations.attention_library import AttentionLibrary, _compile
from rotquant_tvm.runtime import CompiledLibrary
from rotquant_tvm.target import resolve_target

pytestmark = pytest.mark.full

# formats, kv heads, head dimension, sequences, capacity, lengths of the sequences
CASES = {
    "4.2 GiB of f16": ("f16", 8, 128, 11, 100_352, {0: 7, 10: 100_250}),
    "3 bits": ("hurwitz3", 1, 32, 2, 140_000, {0: 100_000, 1: 139_903}),
}
GPU_CASES = CASES | {"4.2 GiB of 3 bits": ("hurwitz3", 1, 128, 320, 140_000, {0: 70, 319: 139_903})}
GPU = [pytest.mark.gpu, pytest.mark.skipif(not tvm.cuda(0).exist, reason="no CUDA device")]
PLACES = [("llvm", case) for case in CASES] + [pytest.param("cuda", case, marks=GPU) for case in GPU_CASES]
CHUNK = 33


def attention(formats: str, kv_heads: int, head_dim: int, target: str) -> SimpleNamespace:
    """An attention's library, its codecs, and what its functions take behind the cache; on a GPU in 16 bits."""
    device, dtype = (tvm.cpu(), "float32") if target == "llvm" else (tvm.cuda(), "float16")
    scale = float(np.float32(head_dim**-0.5))
    geometry = AttentionGeometry(
        2 * kv_heads, kv_heads, head_dim, scale, None, None, dtype, f"{formats}/{formats}", ""
    )
    executable, _ = _compile(geometry.check(), resolve_target(target))
    library = AttentionLibrary(geometry, CompiledLibrary(executable.jit(), [], device))
    config = geometry.config()
    rotations = layer_rotations(config, 0, 1, head_dim).values()
    codecs = config.codecs(0, 1, head_dim)
    made = SimpleNamespace(library=library, scale=scale, codecs=codecs, device=device, dtype=dtype)
    made.rotations = [tvm.runtime.tensor(np.asarray(rotation.data, np.float32), device) for rotation in rotations]
    return made


def put(tiles: torch.Tensor, codecs, rng, count: int) -> list[np.ndarray]:
    """Fill tiles [kv_heads, tiles, words] with random tokens; returns keys and values [kv_heads, count, d] as stored.

    One head at a time, for the sake of memory.
    """
    head_dim, padded = codecs[0].head_dim, -(-count // TOKENS) * TOKENS
    layout = TileLayout(*(codec.format for codec in codecs), head_dim)
    kinds = [np.float16 if codec.format.bits == 16 else np.float32 for codec in codecs]
    result = [np.empty((tiles.shape[0], count, head_dim), kind) for kind in kinds]
    for head in range(tiles.shape[0]):
        drawn = [rng.standard_normal((1, padded // TOKENS, TOKENS, head_dim), np.float32) for _ in codecs]
        encoded = [codec.encode(x, np.float32) for codec, x in zip(codecs, drawn, strict=True)]
        words = np.ascontiguousarray(layout.pack(*encoded)).view(np.int32)[0]
        tiles[head, : len(words)] = torch.from_numpy(words)
        for whole, codec, each in zip(result, codecs, encoded, strict=True):
            whole[head] = held(codec, each, count)[0]
    return result


def held(codec, encoded, count: int) -> np.ndarray:
    """Decoded vectors, float32 [kv_heads, count, d], of tiles [kv_heads, tiles, 32, …]."""
    decoded = codec.decode(encoded, np.float32)
    return decoded.reshape(decoded.shape[0], -1, decoded.shape[-1])[:, :count]


def reference(query, keys, values, scale) -> np.ndarray:
    """Attention of one token's query [heads, d] over lists of keys and values [kv_heads, n, d], one head at a time."""
    kv_heads, head_dim = keys[0].shape[0], keys[0].shape[2]
    groups, outputs = query.reshape(kv_heads, -1, head_dim).astype(np.float64), []
    for head, group in enumerate(groups):
        k, v = (np.concatenate([part[head] for part in parts]).astype(np.float64) for parts in (keys, values))
        scores = group @ k.T * scale
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        outputs.append(weights @ v / weights.sum(-1, keepdims=True))
    return np.concatenate(outputs).reshape(query.shape)


@pytest.mark.parametrize(("target", "case"), PLACES)
def test_decode_and_prefill_far_out(target, case):
    formats, kv_heads, head_dim, batch, capacity, lengths = GPU_CASES[case]
    attend, rng = attention(formats, kv_heads, head_dim, target), np.random.default_rng(0)
    cache = attend.library.create(batch, capacity)
    if "GiB" in case:
        assert cache.nbytes > 4 << 30
    (layer,) = cache.layers
    tiles = from_dlpack(layer).view(torch.int32)
    past = {}
    for row, count in lengths.items():
        past[row] = [[part] for part in put(tiles[row], attend.codecs, rng, count)]
    cache.set_lengths(np.array([lengths.get(row, 0) for row in range(batch)]))

    def draw(heads, count):
        return rng.standard_normal((batch, heads, count, head_dim)).astype(attend.dtype)

    def run(function, *operands):
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(x), attend.device) for x in operands]
        return attend.library.run(function, *tensors, *cache.tensors, *attend.rotations).numpy()

    def check_stored(found, x, codec):
        expected = codec.decode(codec.encode(x.astype(np.float32), np.float32), np.float32)
        if target == "llvm":
            np.testing.assert_allclose(found, expected, atol=1e-4)
        else:  # sums in another order: a value beside a boundary may get the other code
            assert np.mean(np.abs(found - expected) < 2e-3) > 0.99

    def check_output(found, expected):
        if target == "llvm":
            np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=2e-5)
        else:
            error = np.linalg.norm(found.reshape(expected.shape) - expected, axis=-1)
            assert (error <= 1e-2 * np.linalg.norm(expected, axis=-1)).all(), error

    layout = TileLayout(*(codec.format for codec in attend.codecs), head_dim)

    def stored(row, place, count):
        """What the cache holds of tokens place … place + count - 1 of a row."""
        first, last = place // TOKENS, (place + count - 1) // TOKENS + 1
        words = np.ascontiguousarray(tiles[row, :, first:last].cpu().numpy()).view(np.uint8)
        pair = layout.unpack(words)
        skip = place - first * TOKENS
        return [held(codec, each, skip + count)[:, skip:] for codec, each in zip(attend.codecs, pair, strict=True)]

    query, key, value = draw(2 * kv_heads, 1), draw(kv_heads, 1), draw(kv_heads, 1)
    output = run("decode", query.swapaxes(1, 2), key, value)
    cache.advance(np.ones(batch, np.int32), chunk=False)
    for row, count in lengths.items():
        new = stored(row, count, 1)
        for codec, x, found in zip(attend.codecs, (key[row], value[row]), new, strict=True):
            check_stored(found, x, codec)
        past[row] = [[*parts, part] for parts, part in zip(past[row], new, strict=True)]
        expected = reference(query[row, :, 0], *past[row], attend.scale)
        check_output(output[row], expected)

    query, key, value = draw(2 * kv_heads, CHUNK), draw(kv_heads, CHUNK), draw(kv_heads, CHUNK)
    counts = np.array([CHUNK if row in lengths else 0 for row in range(batch)], np.int32)
    output = run("prefill", query.swapaxes(1, 2), key, value, counts)
    cache.advance(counts)
    np.testing.assert_array_equal(cache.lengths, cache.device_lengths())
    for row, count in lengths.items():
        for column in (0, CHUNK - 1):  # the past as it is stored, the chunk's own tokens as they came
            chunk = (x[row, :, : column + 1] for x in (key, value))
            seen = [[*parts, part] for parts, part in zip(past[row], chunk, strict=True)]
            expected = reference(query[row, :, column], *seen, attend.scale)
            check_output(output[row, column], expected)
        new = stored(row, count + 1, CHUNK)
        for codec, x, found in zip(attend.codecs, (key[row], value[row]), new, strict=True):
            check_stored(found, x, codec)
    for row in set(range(batch)) - set(lengths):  # nothing was written by an offset that had wrapped around
        assert int(torch.count_nonzero(tiles[row, :, 1:])) == 0
    assert int(torch.count_nonzero(tiles[0, :, lengths[0] // TOKENS + 3 :])) == 0
