"""Tiny random models of the architectures that transformers has, by name, and what an import must find in each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCAB, POSITIONS = 97, 256
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
_MULTI_HEAD = {"num_key_value_heads": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Architecture:
    """A transformers config class with overrides of tiny sizes, and its layers' attention.

    ``scale`` None is 1/√head_dim; ``windows`` and ``softcap`` are None where there are none.
    """

    kind: str
    overrides: dict[str, Any] = field(default_factory=dict)
    kv_heads: int = 2
    head_dim: int = 32
    scale: float | None = None
    windows: tuple[int | None, int | None] = (None, None)
    softcap: float | None = None

    def config(self) -> transformers.PretrainedConfig:
        """The transformers configuration; raises what transformers raises."""
        sizes = _GPT2 if self.kind == "GPT2" else _COMMON
        return getattr(transformers, f"{self.kind}Config")(**sizes | self.overrides)

    def model(self, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
        """A random model with transformers' own eager attention; norms and biases are not trivial."""
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(self.config(), attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1).add_(0.5 if parameter.ndim == 1 else 0.0)
        return model.to(dtype)


ARCHITECTURES = {
    "llama": Architecture("Llama"),
    "mistral": Architecture("Mistral", {"sliding_window": 24}, windows=(24, 24)),
    "qwen2": Architecture("Qwen2"),
    "qwen3": Architecture("Qwen3", {"head_dim": 64}, head_dim=64),
    "gemma2": Architecture(
        "Gemma2",
        {"head_dim": 64, "sliding_window": 24, "query_pre_attn_scalar": 48, "attn_logit_softcapping": 2.0}
        | {"final_logit_softcapping": 5.0},
        head_dim=64,
        scale=48**-0.5,
        windows=(24, None),
        softcap=2.0,
    ),
    "gemma3": Architecture(
        "Gemma3Text",
        {"head_dim": 256, "sliding_window": 24, "query_pre_attn_scalar": 64}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        head_dim=256,
        scale=0.125,
        windows=(24, None),
    ),
    "phi3": Architecture("Phi3"),
    "phi": Architecture("Phi", {"partial_rotary_factor": 0.5}),
    "gpt2": Architecture("GPT2", kv_heads=4),
    "opt": Architecture("OPT", {"ffn_dim": 160, "word_embed_proj_dim": 128}, kv_heads=4, scale=1.0),
    "gpt_neox": Architecture("GPTNeoX", {"rotary_pct": 0.25}, kv_heads=4),
    "stablelm": Architecture("StableLm", {"partial_rotary_factor": 0.25}),
    "falcon": Architecture("Falcon", {"multi_query": True, "alibi": False}, kv_heads=1),
    # transformers repeats the two kv heads for every query head before its cache
    "falcon-new": Architecture("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, kv_heads=4),
    "granite": Architecture(
        "Granite",
        {"attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0},
        scale=0.3,
    ),
    "olmo2": Architecture("Olmo2"),
    "mixtral": Architecture("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": Architecture("Qwen2Moe", _EXPERTS | {"shared_expert_intermediate_size": 48}),
    "qwen3_moe": Architecture("Qwen3Moe", _EXPERTS | {"head_dim": 32}),
}

REFUSED = {
    "gpt_oss": (Architecture("GptOss", {"head_dim": 32, "num_local_experts": 4}), r"'s_aux' \(attention sinks\)"),
    "deepseek_v2": (Architecture("DeepseekV2", _LATENT), r"'deepseek_v2' has multi-head latent attention \(MLA\)"),
    "deepseek_v3": (Architecture("DeepseekV3", _LATENT), r"'deepseek_v3' has multi-head latent attention \(MLA\)"),
    "falcon-alibi": (Architecture("Falcon", {"alibi": True}), "'falcon' has ALiBi position biases"),
    "bloom": (Architecture("Bloom", {"n_layer": 2, "n_head": 4}), "'bloom' has ALiBi position biases"),
    "mpt": (
        Architecture("Mpt", {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": POSITIONS}),
        "'mpt' has ALiBi position biases",
    ),
}
"""Architectures that are refused, and what the message says."""
