"""Models of a configuration alone: shapes without weights."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import tvm

import rotquant_tvm
from rotquant_tvm.errors import ModelError, UsageError
from rotquant_tvm.frontend import from_config, from_torch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}


def test_it_is_the_model_without_its_weights():
    config = transformers.LlamaConfig(**SIZES)
    shapes = from_config(config, dtype="float32")
    whole = from_torch(transformers.LlamaForCausalLM(config).eval())
    assert shapes.weights is None and shapes.weight_names == whole.weight_names and shapes.config == whole.config
    tvm.ir.assert_structural_equal(shapes.mod, whole.mod)


def test_a_tied_weight_is_one():
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    assert len(from_config(config).weight_names) == len(from_config(transformers.LlamaConfig(**SIZES)).weight_names) - 1


def test_weights_take_no_memory():
    sizes = {"hidden_size": 4096, "intermediate_size": 65536, "num_hidden_layers": 1}
    large = transformers.LlamaConfig(**SIZES | sizes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    imported = from_config(large)
    assert imported.weights is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19  # KiB: the weights are 1.5 GiB


def test_what_is_no_decoder_is_refused():
    with pytest.raises(ModelError, match="encoder-decoder"):
        from_config(transformers.T5Config())
    with pytest.raises(UsageError, match="int8"):
        from_config(transformers.LlamaConfig(**SIZES), dtype="int8")


@pytest.mark.full
def test_a_library_is_given_its_weights(tmp_path):
    config = transformers.LlamaConfig(**SIZES)
    torch.manual_seed(0)
    whole = rotquant_tvm.compile(from_torch(transformers.LlamaForCausalLM(config).eval()), "hurwitz3")
    shapes = rotquant_tvm.compile(from_config(config, dtype="float32"), "hurwitz3")
    assert shapes.weights is None and shapes.weight_types == whole.weight_types
    assert [(w.shape, str(w.dtype)) for w in whole.weights] == whole.weight_types
    for refused in (lambda: shapes.library(), lambda: shapes.save(tmp_path / "model")):
        with pytest.raises(UsageError, match="shapes alone"):
            refused()
    tensors = [tvm.runtime.tensor(weight) for weight in whole.weights]
    library = shapes.library(weights=tensors)
    assert all(mine.same_as(given) for mine, given in zip(library.weights, tensors, strict=True))
    ids = np.arange(40)[None] % 97
    np.testing.assert_array_equal(library.session(1, 64).prefill(ids), whole.session(1, 64).prefill(ids))
