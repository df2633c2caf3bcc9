"""Both protocols over a compiled tiny model, against the same model in NumPy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm

from rotquant_tvm import KVCacheConfig
from rotquant_tvm import compile as compile_model
from rotquant_tvm.errors import UsageError
from rotquant_tvm.evaluation.protocols import EveryToken, Generation
from rotquant_tvm.formats import Codec
from rotquant_tvm.frontend import ImportedModel

CONTEXT = 45
PAIR = "hurwitz3/iso2"


def _tiny_module():
    """The tiny decoder of the tests of the passes."""
    name = "tiny_model_of_passes"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "passes" / "tiny_model.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


TINY = _tiny_module()


class EveryLogitModel(TINY.TinyModel):
    """Returns logits [batch, seq, vocab]."""

    def logits(self, bb, x, positions, last, weight):
        return bb.emit(tvm.relax.op.matmul(x, weight))


def _library(model, quantize_chunk):
    config = {"model_type": "tiny", "vocab_size": TINY.VOCAB, "max_position": 200}
    config["layers"] = [(model.kv_heads, model.heads, model.head_dim)] * model.layers
    imported = ImportedModel(model.module(), model.weights, [f"w{i}" for i in range(len(model.weights))], config)
    parsed = KVCacheConfig.parse(PAIR)
    cache = KVCacheConfig(parsed.formats, parsed.overrides, parsed.seed, parsed.policy, quantize_chunk)
    return compile_model(imported, cache).library()


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(3).integers(0, TINY.VOCAB, (2, CONTEXT)).astype(np.int32)


@pytest.fixture(scope="module")
def expected(ids):
    """Logits [2, context, vocab] in float64, every key and value quantized before it is read."""
    model = TINY.TinyModel()
    codecs = [KVCacheConfig.parse(PAIR).codecs(layer, model.layers, model.head_dim) for layer in range(model.layers)]

    def held(layer, new):
        return [_roundtrip(codec, x) for codec, x in zip(codecs[layer], new, strict=True)]

    return np.array([[model.forward(row[: n + 1], model.empty_past(), held)[0] for n in range(CONTEXT)] for row in ids])


def _roundtrip(codec: Codec, x):
    return codec.decode(codec.encode(x, np.float32))


@pytest.fixture(scope="module")
def every_logit():
    return _library(EveryLogitModel(), quantize_chunk=True)


@pytest.fixture(scope="module")
def ordinary():
    return _library(TINY.TinyModel(), quantize_chunk=False)


@pytest.mark.full
def test_every_token_is_quantized_before_it_is_read(every_logit, ids, expected):
    (part,) = EveryToken().predictions(every_logit, ids)
    assert part.first == 1 and part.logits.shape == (2, CONTEXT - 1, TINY.VOCAB) and part.seconds > 0
    np.testing.assert_allclose(part.logits, expected[:, :-1], atol=2e-3)


def test_generation_scores_what_decode_steps_predict(ordinary, ids):
    parts = list(Generation(20).predictions(ordinary, ids))
    assert [part.first for part in parts] == list(range(21, CONTEXT))
    session = ordinary.session(2, CONTEXT)
    session.prefill(ids[:, :20])
    for part in parts:
        assert part.logits.shape == (2, 1, TINY.VOCAB)
        np.testing.assert_array_equal(part.logits[:, 0], session.decode(ids[:, part.first - 1]))


def test_generation_from_the_first_token_quantizes_every_other(ordinary, ids, expected):
    """The prefill's one token sees itself unquantized; a chunk of one is the only difference."""
    logits = np.concatenate([part.logits for part in Generation(1).predictions(ordinary, ids)], axis=1)
    far = np.abs(logits - expected[:, 1:-1]).max(-1)
    assert np.median(far) < 0.2 * np.abs(expected).mean()


def test_batches_keep_one_calls_logits_bounded():
    assert EveryToken().batch(16, 1024, 49152) == 3
    assert EveryToken().batch(2, 1024, 49152) == 2 and EveryToken().batch(4, 1024, 151936) == 1
    with pytest.raises(UsageError, match="context of 655 or less"):
        EveryToken().batch(4, 1024, 256000)
    assert EveryToken().batch(4, 655, 256000) == 1
    assert Generation(5).batch(16, 32768, 256000) == 16
