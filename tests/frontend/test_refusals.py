"""What an import refuses, in one line that names it, leaving the model as it was."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from transformers import masking_utils

from rotquant_tvm.errors import ModelError, UsageError
from rotquant_tvm.frontend import from_torch, import_model
from rotquant_tvm.frontend.attention_interface import Trace

REFUSED = {
    "softcap": ("Gemma2", {"attn_logit_softcapping": -1.0}, "'gemma2': Gemma2Attention caps its scores softly at -1.0"),
    "sinks": ("GptOss", {"head_dim": 16, "num_local_experts": 4}, r"passes 's_aux' \(attention sinks\)"),
    "chunked": ("Llama4Text", {"head_dim": 16, "attention_chunk_size": 4}, "'llama4_text' asks for a mask"),
    "no attention": ("Mamba", {}, "'mamba' has no attention"),
    "recurrent state": ("Jamba", {}, "'jamba' keeps more than keys and values"),
    "own attention": ("GPTJ", {"rotary_dim": 8}, "'gptj' has no attention, or computes it outside"),
    "not causal": ("Bert", {"is_decoder": False}, "'bert' asks for a mask"),
    "latent attention": ("DeepseekV3", {"num_key_value_heads": 4}, "'deepseek_v3' has multi-head latent attention"),
    "length-dependent rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope type 'dynamic'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_model_is_refused_by_name(name, tiny):
    kind, overrides, message = REFUSED[name]
    model = tiny(kind, **overrides)
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=message) as refusal:
        from_torch(model)
    assert "\n" not in str(refusal.value)
    assert model.config._attn_implementation == before


def test_softcap_that_is_off_is_accepted(tiny):
    model = tiny("Gemma2", head_dim=16, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert from_torch(model).config["layers"] == [(2, 4, 16)] * 2


def test_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="'t5' is an encoder-decoder"):
        from_torch(transformers.T5ForConditionalGeneration(config))


def test_other_objects_and_dtypes_are_refused(tiny):
    with pytest.raises(ModelError, match="Linear is not a transformers model"):
        from_torch(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"torch.float64 .*model.float\(\)"):
        from_torch(tiny("Llama").double())
    with pytest.raises(ModelError, match="meta device"):
        from_torch(tiny("Llama").to("meta"))
    with pytest.raises(ModelError, match="no output embedding"):
        from_torch(tiny("Llama").model)
    with pytest.raises(UsageError, match="dtype 'int8' is not one of float32, float16"):
        import_model("anywhere", dtype="int8")


def test_the_attention_does_not_run_outside_an_import(tiny):
    model = tiny("Llama")
    model.set_attn_implementation("rotquant")
    with pytest.raises(ModelError, match="only runs during an import"):
        model(torch.zeros((1, 2), dtype=torch.int64))


@pytest.mark.parametrize(
    ("mask_function", "window", "accepted"),
    [
        (masking_utils.causal_mask_function, None, True),
        (masking_utils.sliding_window_causal_mask_function(5), 5, True),
        (masking_utils.sliding_window_causal_mask_function(5), 6, False),
        (masking_utils.sliding_window_causal_mask_function(5), None, False),
        (masking_utils.sliding_window_causal_mask_function(4096), None, False),
        (masking_utils.causal_mask_function, 5, False),
        (masking_utils.bidirectional_mask_function, None, False),
        (masking_utils.chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int64)), 8, False),
        (lambda batch, head, q, kv: (kv <= q) & (kv != 1), None, False),
    ],
)
def test_masks_are_checked_by_their_values(mask_function, window, accepted):
    trace = Trace("a model", masks=[(mask_function, window)])
    if accepted:
        trace.check_masks()
    else:
        with pytest.raises(ModelError, match="'a model' asks for a mask"):
            trace.check_masks()


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_missing_package_is_named_with_its_remedy(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=rf"'{package}'.*pip install 'rotquant-tvm\[torch\]'"):
        import_model(tmp_path)
