"""The compile report: what was rewritten and what it costs, as plain data and as a table."""

from __future__ import annotations

from typing import Any

import tvm

from .formats import TOKENS, KVFormat


def compile_report(
    info: dict[str, Any],
    config: dict[str, Any],
    target: tvm.target.Target,
    seconds: dict[str, float],
    mod: tvm.IRModule,
) -> dict[str, Any]:
    """Describe a compiled library.

    Per layer: K and V format, true bits per element (gains counted), bytes per token of the cache and of an f16 cache;
    their totals; the KV kernels in the module; seconds per stage.
    """
    layers = []
    for index, layer in enumerate(info["layers"]):
        head_dim, kv_heads = layer["head_dim"], layer["kv_heads"]
        layers.append(
            {
                "layer": index,
                "k": layer["k"],
                "v": layer["v"],
                "kv_heads": kv_heads,
                "head_dim": head_dim,
                "k_bits": KVFormat.parse(layer["k"]).bits_per_element(head_dim),
                "v_bits": KVFormat.parse(layer["v"]).bits_per_element(head_dim),
                "bytes_per_token": kv_heads * layer["tile_bytes"] / TOKENS,
                "f16_bytes_per_token": kv_heads * head_dim * 4,
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
        "kernels": sorted(g.name_hint for g in mod.functions if g.name_hint.startswith("kv_")),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def cache_bytes(info: dict[str, Any], tokens: int) -> int:
    """Bytes of cache that one sequence of ``tokens`` tokens takes, whole tiles counted."""
    tiles = -(-tokens // TOKENS)
    return sum(layer["kv_heads"] * layer["tile_bytes"] * tiles for layer in info["layers"])
