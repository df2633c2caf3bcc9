"""Models of transformers' families: the canonical module computes what transformers computes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from rotquant_tvm.frontend import from_torch, import_model
from rotquant_tvm.frontend.canonical_form import check_canonical
from rotquant_tvm.frontend.torch_export import DecoderStep, rotquant_attention

from ..sampling import sampled

IDS = np.random.default_rng(1).integers(3, 97, (2, 13))

# kind, config overrides, kv heads, head_dim, scales and windows of the two layers
MODELS = {
    "llama": ("Llama", {}, 2, 16, [0.25, 0.25], [None, None]),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, 2, 16, [0.25, 0.25], [None, None]),
    "qwen2-bias": ("Qwen2", {}, 2, 16, [0.25, 0.25], [None, None]),
    "mistral-window": ("Mistral", {"sliding_window": 4}, 2, 16, [0.25, 0.25], [4, 4]),
    "gpt2": ("GPT2", {}, 4, 16, [0.25, 0.25], [None, None]),
    "qwen3-qk-norm": ("Qwen3", {"head_dim": 32}, 2, 32, [32**-0.5] * 2, [None, None]),
    "phi-partial-rotary": ("Phi", {"partial_rotary_factor": 0.5}, 2, 16, [0.25, 0.25], [None, None]),
    "gemma3-alternating": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 64,
        },
        2,
        16,
        [0.125, 0.125],
        [4, None],
    ),
    "mixtral-experts": ("Mixtral", {"num_local_experts": 4}, 2, 16, [0.25, 0.25], [None, None]),
}
COVERED = {"llama-tied", "qwen2-bias", "mixtral-experts"}
"""What differs in these has tests of its own."""


def _logits(model, ids, positions=None):
    """Logits of every token, by transformers' own eager attention."""
    positions = None if positions is None else torch.tensor(positions)
    with torch.no_grad():
        return model(torch.tensor(ids), position_ids=positions).logits.float().numpy()


@pytest.mark.parametrize("name", sampled(MODELS, MODELS.keys() - COVERED))
def test_canonical_module_computes_what_transformers_computes(name, tiny, runner, attentions):
    kind, overrides, kv_heads, head_dim, scales, windows = MODELS[name]
    model = tiny(kind, **overrides)
    expected = _logits(model, IDS)
    imported = from_torch(model)

    assert imported.config["layers"] == [(kv_heads, 4, head_dim)] * 2
    found = attentions(imported.mod)
    np.testing.assert_allclose([scale for scale, _ in found], scales, rtol=1e-7)
    assert [window for _, window in found] == windows

    run = runner(imported)
    # a ragged chunk without past: row 1 is padded after its fifth token
    logits, past = run.step(IDS[:, :7], run.empty_past(2), last=[6, 4])
    np.testing.assert_allclose(logits, [expected[0, 6], expected[1, 4]], atol=2e-5)
    for start, stop in [(7, 8), (8, 11), (11, 12), (12, 13)]:
        logits, past = run.step(IDS[:, start:stop], past)
        np.testing.assert_allclose(logits, expected[:, stop - 1], atol=2e-5)
    assert all(present.shape == (2, kv_heads, 13, head_dim) for present in past)


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_every_logit_is_returned_on_request(kind, tiny, runner):
    model = tiny(kind)
    expected = _logits(model, IDS)
    imported = from_torch(model, every_logit=True)
    function = imported.mod["main"]
    assert [param.name for param in function.params[:3]] == ["ids", "positions", "last"]
    logits = function.ret_ty.fields[0].shape.values
    assert [size.name for size in logits[:2]] == ["batch", "seq"] and int(logits[2]) == 97

    run = runner(imported)
    first, past = run.step(IDS[:, :8], run.empty_past(2), last=[0, 0])
    second, _ = run.step(IDS[:, 8:], past, last=[0, 0])
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), expected, atol=2e-5)


def test_signature(tiny):
    imported = from_torch(tiny("Llama"))
    function = imported.mod["main"]
    inputs = ["ids", "positions", "last", "past_k_0", "past_v_0", "past_k_1", "past_v_1"]
    assert [param.name for param in function.params[:7]] == inputs
    assert int(function.attrs["num_input"]) == 7
    roles = {str(k): str(v) for k, v in function.attrs["rotquant.inputs"].items()}
    assert roles == {"ids": "ids", "positions": "positions", "last": "last"}
    assert all(param.ty.dtype.dtype == "int32" for param in function.params[:3])
    batch, seq = function.params[0].ty.shape.values
    past = function.params[3].ty.shape.values[2]
    assert (batch.name, seq.name, past.name) == ("batch", "seq", "past")
    analyzer = tvm.sym.Analyzer()
    logits, *presents = function.ret_ty.fields
    assert logits.shape.values[0].same_as(batch) and int(logits.shape.values[1]) == 97
    for present in presents:
        assert analyzer.can_prove_equal(present.shape.values[2], past + seq)
    assert len(imported.weights) == len(imported.weight_names) == len(function.params) - 7
    for weight, param in zip(imported.weights, function.params[7:], strict=True):
        assert weight.shape == tuple(int(size) for size in param.ty.shape.values)
    check_canonical(imported.mod, 2)
    assert imported.config["model_type"] == "llama"
    assert (imported.config["vocab_size"], imported.config["max_position"]) == (97, 128)
    assert imported.tokenizer is None


def test_weights_are_the_models_own_memory_under_its_own_names(tiny):
    model = tiny("Llama")
    imported = import_model(model)
    parameters = dict(model.named_parameters())
    assert set(imported.weight_names) == set(parameters)
    for name, weight in zip(imported.weight_names, imported.weights, strict=True):
        assert np.shares_memory(weight, parameters[name].detach().numpy())


def test_tied_embedding_is_one_weight(tiny):
    imported = from_torch(tiny("Llama", tie_word_embeddings=True))
    assert imported.weight_names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in imported.weight_names
    assert sum(weight.shape == (97, 64) for weight in imported.weights) == 1


def test_positions_are_taken_row_by_row(tiny, runner):
    model = tiny("Llama")
    positions = np.stack([np.arange(13), np.arange(13) + 40])
    expected = _logits(model, IDS, positions)
    run = runner(from_torch(model))
    logits, past = run.step(IDS[:, :9], run.empty_past(2), positions=positions[:, :9])
    np.testing.assert_allclose(logits, expected[:, 8], atol=2e-5)
    logits, _ = run.step(IDS[:, 9:], past, positions=positions[:, 9:])
    np.testing.assert_allclose(logits, expected[:, 12], atol=2e-5)


def test_one_token_specialization(tiny, runner):
    model = tiny("Llama")
    expected = _logits(model, IDS)
    imported = from_torch(model)
    one = relax.transform.BindSymbolicVars({"seq": 1})(imported.mod)
    assert [int(size) for size in one["main"].params[0].ty.shape.values[1:]] == [1]
    run = runner(imported)
    _, past = run.step(IDS[:, :12], run.empty_past(2))
    logits, _ = runner(dataclasses.replace(imported, mod=one)).step(IDS[:, 12:], past)
    np.testing.assert_allclose(logits, expected[:, 12], atol=2e-5)


def test_half_precision(tiny, runner):
    model = tiny("Llama").half()
    expected = _logits(model.float(), IDS)
    imported = from_torch(model.half())
    assert {weight.dtype for weight in imported.weights} == {np.dtype("float16")}
    assert imported.mod["main"].params[3].ty.dtype.dtype == "float16"
    run = runner(imported)
    logits, past = run.step(IDS[:, :9], run.empty_past(2))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected[:, 8], atol=2e-2)
    logits, _ = run.step(IDS[:, 9:], past)
    np.testing.assert_allclose(logits, expected[:, 12], atol=2e-2)


def test_the_step_also_runs_in_torch(tiny):
    model = tiny("Mistral", sliding_window=4)
    expected = _logits(model, IDS)
    step = DecoderStep(model)
    ids, positions = (torch.tensor(x, dtype=torch.int32) for x in (IDS, np.stack([np.arange(13)] * 2)))
    last = torch.tensor([8, 8], dtype=torch.int32)
    with rotquant_attention(model):
        logits, *presents = step(ids[:, :9], positions[:, :9], last, {})
        past = {f"{kind}_{layer}": presents[2 * layer + i] for layer in (0, 1) for i, kind in enumerate("kv")}
        after, *_ = step(ids[:, 9:], positions[:, 9:], last - 5, past)
    np.testing.assert_allclose(logits, expected[:, 8], atol=2e-5)
    np.testing.assert_allclose(after, expected[:, 12], atol=2e-5)


def test_the_model_is_left_as_it_was(tiny):
    model = tiny("Mixtral", num_local_experts=4)
    experts = model.config._experts_implementation
    model.train()
    from_torch(model)
    assert model.training
    assert model.config._attn_implementation == "eager"
    assert model.config._experts_implementation == experts
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.lm_head._forward_pre_hooks
