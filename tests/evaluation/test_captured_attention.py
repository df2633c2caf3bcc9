"""What is captured from a torch model is what its attention reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from rotquant_tvm.evaluation.captured_attention import capture_attention, captured
from rotquant_tvm.evaluation.layer_errors import layer_errors
from rotquant_tvm.evaluation.libraries import Candidate
from rotquant_tvm.evaluation.result_store import ResultStore

IDS = np.random.default_rng(4).integers(0, 61, 50)
SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.MistralConfig(sliding_window=9, **SIZES)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_keys_and_values_are_those_of_the_models_own_cache(model):
    with torch.no_grad():
        output = model(torch.from_numpy(IDS)[None], use_cache=True, output_attentions=True)
    cache = transformers.DynamicCache(config=None)
    with torch.no_grad():
        model(torch.from_numpy(IDS)[None], past_key_values=cache)
    sites = captured(model, IDS)
    assert len(sites) == 3 and model.config._attn_implementation == "eager"
    for site, layer, weights in zip(sites, cache.layers, output.attentions, strict=True):
        np.testing.assert_allclose(site.k, layer.keys[0], atol=1e-5)
        np.testing.assert_allclose(site.v, layer.values[0], atol=1e-5)
        assert site.window == 9 and site.scale == pytest.approx(32**-0.5) and site.q.shape == (2, 50, 32)
        scores = site.q[1] @ site.k[0].T * site.scale
        mine = np.exp(scores[-1, -9:] - scores[-1, -9:].max())
        np.testing.assert_allclose(weights[0, 1, -1, -9:], mine / mine.sum(), atol=1e-5)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("mistral")
    model.save_pretrained(path)
    return path


def test_a_model_is_read_from_its_files(model, folder):
    for mine, theirs in zip(capture_attention(folder, IDS), captured(model, IDS), strict=True):
        np.testing.assert_allclose(mine.k, theirs.k, atol=1e-6)


def test_errors_of_layers_follow_their_formats_and_are_kept(folder, tmp_path):
    candidates = [Candidate.parse(text, "1=f16") for text in ("hurwitz2", "hurwitz4", "f16/hurwitz2")]
    steps: list[str] = []

    def run(digest="d"):
        store = ResultStore(tmp_path)
        return layer_errors(folder, IDS, digest, candidates, store, {"model": "m"}, steps.append)

    document = run()
    two, four, values = (row["layers"] for row in document["rows"])
    assert document["tokens"] == 50 and [row["label"] for row in document["rows"]][1] == "hurwitz4 [1=f16]"
    for layer in (0, 2):
        assert two[layer]["both"] > 2 * four[layer]["both"] > 0.02
        assert values[layer]["k"] < 1e-3 < values[layer]["v"] and values[layer]["v"] == pytest.approx(two[layer]["v"])
    assert two[1]["both"] < 1e-3 and steps[0].startswith("capture")
    steps.clear()
    assert run() == document and steps == []
    run("another window")
    assert steps
