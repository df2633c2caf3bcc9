"""Compiled SmolLM2 against torch, token by token.

A difference in the last bit of float32 moves a key or value across a quantization boundary now and then, and from then
on two runs drift apart, torch from itself included. So the reference takes each stored code from the compiled cache;
the tests check separately that torch would have chosen the same code or stood on the boundary.
"""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm.formats import Codec, EncodedKV, TileLayout
from rotquant_tvm.kv_cache_config import KVCacheConfig

from .conftest import compiled

pytestmark = [pytest.mark.model, pytest.mark.slow]

# One of each kind in the ordinary run; the others with ``-m full``.
FORMATS = ["hurwitz3", "planar3/f16"]
FULL = ["iso3", "planar3", "turbo3", "rotor3", "q8_0"]


def token_by_token(session, ids: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocab] of a session that decodes every token, without prefill."""
    return np.stack([session.decode(np.array([token]))[0] for token in ids])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def mean_kl(reference: np.ndarray, logits: np.ndarray) -> float:
    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def stored(session, layer: int, codecs: tuple[Codec, Codec], tokens: int) -> list[EncodedKV]:
    """The codes and gains of a layer's keys and values in a session's cache, [1, kv_heads, tokens, …]."""
    words = session.cache.layers[layer].numpy()
    layout = TileLayout(codecs[0].format, codecs[1].format, codecs[0].head_dim)
    result = []
    for encoded in layout.unpack(words.view(np.uint8).reshape(*words.shape[:3], layout.tile_bytes)):
        shape = (*words.shape[:2], words.shape[2] * 32, -1)
        gain = encoded.gain.reshape(*shape[:3], encoded.gain.shape[-1])
        result.append(EncodedKV(encoded.codes.reshape(shape)[:, :, :tokens], gain[:, :, :tokens]))
    return result


def off_boundary(codec: Codec, x: np.ndarray, mine: EncodedKV, theirs: EncodedKV) -> tuple[int, float]:
    """(how many codes differ, the largest distance of such an element from the boundary between the two codes).

    Distances are relative to the vector's largest element, in the rotated basis.
    """
    gains = 0.0
    if codec.format.codebook == "linear":
        gains, mine = with_their_gain(x, mine, theirs)
    different = mine.codes != theirs.codes
    if not different.any():
        return 0, gains
    y = codec.rotate(x.astype(np.float64))
    if codec.codebook is not None:
        norm = np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
        distance = np.abs(y[..., None] - norm[..., None] * codec.codebook.boundaries).min(-1)
    else:
        a, b = codec.decode_rotated(mine), codec.decode_rotated(theirs)
        distance = np.abs(np.abs(y - a) - np.abs(y - b)) / 2
    largest = np.abs(y).max(-1, keepdims=True)
    return int(different.sum()), max(gains, float((distance / largest)[different].max()))


def with_their_gain(x: np.ndarray, mine: EncodedKV, theirs: EncodedKV) -> tuple[float, EncodedKV]:
    """q8_0's gain is rounded before its codes: (how far such a rounding was from its boundary, codes by their gain)."""
    blocks = np.abs(x.astype(np.float64)).reshape(*x.shape[:-1], -1, 32).max(-1) / 127
    middle = (mine.gain.astype(np.float64) + theirs.gain.astype(np.float64)) / 2
    different = mine.gain != theirs.gain
    furthest = float((np.abs(blocks - middle) / blocks)[different].max(initial=0))
    scale = np.repeat(theirs.gain.astype(np.float32), 32, axis=-1)
    codes = np.clip(np.rint(x / scale), -127, 127).astype(np.int8).view(np.uint8)
    return furthest, EncodedKV(codes, theirs.gain)


def teacher_forced(model, ids: np.ndarray, session, kv_cache: str) -> tuple[np.ndarray, list[tuple[int, float]]]:
    """Torch's logits with every key and value read from the session's cache, and how its own codes compare."""
    import torch
    from transformers.cache_utils import DynamicCache

    config, layers = KVCacheConfig.parse(kv_cache), len(session.info.layers)
    differences: list[tuple[int, float]] = []

    class StoredCache(DynamicCache):
        def update(self, key, value, layer, *args, **kwargs):
            codecs = config.codecs(layer, layers, key.shape[-1])
            decoded = []
            for codec, x, encoded in zip(
                codecs, (key, value), stored(session, layer, codecs, len(ids)), strict=True
            ):
                mine = codec.encode(x.numpy(), np.float32)
                differences.append(off_boundary(codec, x.numpy(), mine, encoded))
                decoded.append(torch.from_numpy(codec.decode(encoded).astype(np.float32)))
            return super().update(*decoded, layer, *args, **kwargs)

    with torch.no_grad():
        output = model(torch.from_numpy(ids[None]).long(), past_key_values=StoredCache(), use_cache=True)
    return output.logits[0].numpy(), differences


def test_f16_cache_matches_torch(torch_model, ids):
    import torch

    session = compiled("f16").session(capacity=len(ids))
    logits = token_by_token(session, ids)
    reference, differences = teacher_forced(torch_model, ids, session, "f16")
    assert np.abs(logits - reference).max() <= 2e-3
    assert (logits.argmax(-1) == reference.argmax(-1)).all()
    assert max(distance for _, distance in differences) <= 1e-5
    with torch.no_grad():
        plain = torch_model(torch.from_numpy(ids[None]).long()).logits[0].numpy()
    assert np.abs(logits - plain).max() <= 0.1
    assert (logits.argmax(-1) == plain.argmax(-1)).all()


@pytest.mark.parametrize("kv_cache", FORMATS + [pytest.param(f, marks=pytest.mark.full) for f in FULL])
def test_quantized_cache_matches_fake_quantization(torch_model, ids, kv_cache, record_property):
    model = compiled(kv_cache)
    session = model.session(capacity=len(ids))
    logits = token_by_token(session, ids)
    reference, differences = teacher_forced(torch_model, ids, session, kv_cache)
    kl, flips = mean_kl(reference, logits), sum(count for count, _ in differences)
    furthest = max(distance for _, distance in differences)
    for name, value in (("kl", kl), ("codes_that_differ", flips), ("furthest_from_boundary", furthest)):
        record_property(name, value)
    largest = np.abs(logits - reference).max()
    print(f"{kv_cache}: KL {kl:.1e}, max |Δ| {largest:.1e}, {flips} codes differ, by {furthest:.1e} at most")
    assert kl <= 1e-3
    assert furthest <= 1e-4
    assert (logits.argmax(-1) == reference.argmax(-1)).mean() >= 0.99
    assert session.kv_bytes() == model.report["bytes_per_token"] * 256


def test_ragged_prefill_equals_single_sequences(ids):
    library = compiled("rq3").library()
    rows = [ids[:118].tolist(), ids[100:133].tolist(), ids[200:201].tolist()]
    together = library.session(batch=3, capacity=128)
    first = together.prefill(rows)
    second = together.prefill([[5, 6, 7], [], [8]])
    for index, row in enumerate(rows):
        alone = library.session(capacity=128)
        np.testing.assert_allclose(first[index], alone.prefill([row])[0], atol=2e-3)
        if index != 1:
            np.testing.assert_allclose(second[index], alone.prefill([[[5, 6, 7], [], [8]][index]])[0], atol=2e-3)


def test_generates_text(ids):
    session = compiled("rq3").session(capacity=512)
    answer = session.generate("What is the capital of France?", chat=True, max_tokens=24)
    assert "Paris" in answer.text
