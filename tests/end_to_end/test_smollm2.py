"""Compiled SmolLM2 against torch, token by token.

A difference in the last bit of float32 moves a key or value across a quantization boundary now and then, and from then
on two runs drift apart, torch from itself included. So the reference takes each stored code from the compiled cache;
the tests check separately that torch would have chosen the same code or stood on the boundary.
"""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm.kv_cache_config import KVCacheConfig

from ..stored_codes import off_boundary, stored
from .conftest import compiled

pytestmark = [pytest.mark.model, pytest.mark.slow]

# One of each kind in the ordinary run; the others with ``-m full``.
FORMATS = ["hurwitz3"]
FULL = ["planar3/f16", "iso3", "planar3", "turbo3", "rotor3", "q8_0"]


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
                codecs, (key, value), stored(session, layer, codecs, 0, len(ids)), strict=True
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


@pytest.mark.full
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


@pytest.mark.full
def test_generates_text(ids):
    session = compiled("rq3").session(capacity=512)
    answer = session.generate("What is the capital of France?", chat=True, max_tokens=24)
    assert "Paris" in answer.text
