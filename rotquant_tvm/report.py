"""The compile report: what was rewritten and what it costs, as plain data and as a table."""

from __future__ import annotations

from typing import Any

import tvm

from .formats import KVFormat
from .kernel_report import kv_kernels, layer_kernels, records_used

LENGTHS = (1024, 8192, 32768)
"""The sequence lengths, in tokens, whose true bits the report gives."""


def compile_report(
    info: dict[str, Any],
    config: dict[str, Any],
    target: tvm.target.Target,
    seconds: dict[str, float],
    mod: tvm.IRModule,
    pass_seconds: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Describe a compiled library.

    Per layer: K and V format and cache policy, bits per element of a packed token (gains and centres counted), its
    bytes and those in an f16 cache, the window and the tokens that its ring of tiles keeps (None: every token), the
    bytes of its arrays for sequences of ``LENGTHS`` tokens, the kernels of ``layer_kernels``, and in words which
    weights have taken over the rotations of K and V ("folded", None where ``FoldRotation`` did not run), and why K or V
    stay in 16 bits where they were to be quantized ("kept"); totals; the
    true bits per element of whole sequences of ``LENGTHS`` tokens, and their bytes beside those of an f16 cache of
    every token, every array counted as it is allocated; the KV kernels in the module, and the tuning records that all
    kernels are from; the batch, if it is fixed; whether there are logits after every token;
    seconds per stage, and per pass of the pipeline.
    """
    from .passes.fold_rotation import fold_texts, folded_rotations
    from .passes.quantize_kv_cache import kept_layers
    from .runtime.cache_info import KVCacheInfo

    named = {gvar.name_hint for gvar in mod.get_global_vars()}
    folds = folded_rotations(mod["decode"]) if "decode" in named else []
    kept = kept_layers(mod["decode"]) if "decode" in named else {}
    layers, checked = [], KVCacheInfo.from_document(info).layers
    kernels = layer_kernels(mod, len(info["layers"]))
    for index, layer in enumerate(info["layers"]):
        head_dim, kv_heads, policy = layer["head_dim"], layer["kv_heads"], checked[index].policy
        k_bits, v_bits = (KVFormat.parse(layer[role]).bits_per_element(head_dim) for role in "kv")
        per_token = checked[index].bytes_per_token
        layers.append(
            {
                "layer": index,
                "k": layer["k"],
                "v": layer["v"],
                "kv_heads": kv_heads,
                "head_dim": head_dim,
                "policy": policy.name,
                "k_bits": 8 * per_token / (kv_heads * head_dim) - v_bits if policy.center else k_bits,
                "v_bits": v_bits,
                "bytes_per_token": per_token,
                "f16_bytes_per_token": kv_heads * head_dim * 4,
                "window": checked[index].window,
                "tokens_kept": layer.get("tokens_kept"),
                "cache_bytes": {str(tokens): checked[index].cache_bytes(tokens) for tokens in LENGTHS},
                "kernels": kernels[index],
                "folded": fold_texts(folds[index]) if folds else None,
                "kept": kept.get(index, {}),
            }
        )
    stored = sum(layer["bytes_per_token"] for layer in layers)
    plain = sum(layer["f16_bytes_per_token"] for layer in layers)
    return {
        "model_type": config["model_type"],
        "target": str(target),
        "layers": layers,
        "layers_rewritten": len(layers),
        "bits_per_element": 16 * stored / plain,
        "bytes_per_token": stored,
        "f16_bytes_per_token": plain,
        "compression": plain / stored,
        "true_bits": {str(tokens): true_bits(info, tokens) for tokens in LENGTHS},
        "cache_bytes": {str(tokens): cache_bytes(info, tokens) for tokens in LENGTHS},
        "f16_cache_bytes": {str(tokens): plain * tokens for tokens in LENGTHS},
        "kernels": kv_kernels(mod),
        "tuning_records": records_used(mod),
        "batch": info.get("batch"),
        "every_logit": info.get("every_logit", False),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "pass_seconds": {name: round(value, 4) for name, value in (pass_seconds or {}).items()},
    }


def cache_bytes(info: dict[str, Any], tokens: int) -> int:
    """Bytes of the arrays that one sequence of ``tokens`` tokens takes, as they are allocated."""
    from .runtime.cache_info import KVCacheInfo

    return KVCacheInfo.from_document(info).cache_bytes(1, tokens)


def true_bits(info: dict[str, Any], tokens: int) -> float:
    """Bits per element of K and V of a sequence of ``tokens`` tokens: codes, gains, centres, 16-bit segments."""
    elements: int = sum(2 * layer["kv_heads"] * layer["head_dim"] for layer in info["layers"]) * tokens
    return 8 * cache_bytes(info, tokens) / elements
