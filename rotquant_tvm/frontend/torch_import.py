"""A transformers causal LM in memory to the canonical Relax module."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from transformers import PreTrainedModel

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.attention_interface import AttentionCall
from rotquant_tvm.frontend.canonical import to_canonical
from rotquant_tvm.frontend.hf import check_decoder
from rotquant_tvm.frontend.imported_model import ImportedModel, TokenizerData
from rotquant_tvm.frontend.torch_export import export_step, probe_attention, rotquant_attention


def import_torch_model(
    model: PreTrainedModel, tokenizer: TokenizerData | None, every_logit: bool = False, with_weights: bool = True
) -> ImportedModel:
    """Import a model and leave it as it was; ``every_logit`` as of ``import_model``.

    Not ``with_weights``: its weights are no more than shapes, and the result's are None. Raises ModelError if the
    canonical form cannot hold it.
    """
    _check_model(model)
    with rotquant_attention(model):
        calls = probe_attention(model)
        program = export_step(model, calls, every_logit)
    canonical = to_canonical(program, calls, model.config.model_type)
    names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
    return ImportedModel(
        mod=canonical.mod,
        weights=[_as_numpy(weight) for weight in canonical.weights] if with_weights else None,
        weight_names=[names[id(weight)] for weight in canonical.weights],
        config=_config(model, calls),
        tokenizer=tokenizer,
    )


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is not a transformers model")
    check_decoder(model.config)
    if model.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ModelError(
            f"a model in {model.dtype} cannot be imported; convert it with model.float() or model.half()"
        )
    if kind := _foreign_attention(model.config.get_text_config()):
        raise ModelError(f"{model.config.model_type!r} has {kind}, which is not supported")
    if changing := _rope_types(model.config.get_text_config()) & {"dynamic", "longrope"}:
        raise ModelError(
            f"{model.config.model_type!r} has the rope type {changing.pop()!r}, whose rotation changes with "
            "the length of the text; one compiled step cannot hold it"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"{type(model).__name__} has weights on the meta device; load them first")


def _foreign_attention(config: Any) -> str:
    """Name what a config says of its attention that no cache of keys and values per head holds; else empty."""
    attention = getattr(config, "attn_config", None)
    if getattr(config, "alibi", False) or getattr(attention, "alibi", False) or config.model_type == "bloom":
        return "ALiBi position biases in its attention scores"
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention (MLA)"
    return ""


def _rope_types(config: Any) -> set[str]:
    """Collect the rotary embeddings that a config names: one for all layers, or one per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        part["rope_type"] for part in (rope, *rope.values()) if isinstance(part, dict) and "rope_type" in part
    }


def _as_numpy(weight: torch.Tensor) -> np.ndarray:
    """Return a view of a weight's memory where possible; torch knows no NumPy bfloat16, hence its bits."""
    weight = weight.detach().cpu().contiguous()
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return weight.numpy()


def _config(model: PreTrainedModel, calls: list[AttentionCall]) -> dict[str, Any]:
    config = model.config.get_text_config()
    return {
        "model_type": model.config.model_type,
        "vocab_size": config.vocab_size,
        "max_position": getattr(config, "max_position_embeddings", None),
        "layers": [(call.kv_heads, call.heads, call.head_dim) for call in calls],
    }
