"""The compile report as a table: what is stored how, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from rich.table import Table

from rotquant_tvm.cli.output import table

_SHOWN = ("k", "v", "kv_heads", "head_dim", "k_bits", "v_bits", "bytes_per_token", "f16_bytes_per_token")


def report_table(report: Mapping[str, Any]) -> Table:
    """Return one row per run of equal layers, and their total."""
    rows: list[list[object]] = []
    for _, group in groupby(report["layers"], key=lambda layer: [layer[key] for key in _SHOWN]):
        same = list(group)
        first, last, count = same[0], same[-1], len(same)
        span = f"{first['layer']}–{last['layer']}" if count > 1 else str(first["layer"])
        rows.append(
            [
                span,
                first["k"],
                first["v"],
                f"{first['kv_heads']}×{first['head_dim']}",
                first["k_bits"],
                first["v_bits"],
                count * first["bytes_per_token"],
                count * first["f16_bytes_per_token"],
                f"{first['f16_bytes_per_token'] / first['bytes_per_token']:.3g}×",
            ]
        )
    if len(rows) > 1:
        total = [report["bytes_per_token"], report["f16_bytes_per_token"], f"{report['compression']:.3g}×"]
        rows.append(["all", "", "", "", None, None, *total])
    columns = [
        "layers",
        "K",
        "V",
        "kv heads",
        "K bits/el.",
        "V bits/el.",
        "B/token",
        "B/token f16",
        "smaller by",
    ]
    return table("KV cache", columns, rows, left=4)


def report_line(report: Mapping[str, Any]) -> str:
    """Return the report in one line."""
    formats = sorted(
        {layer["k"] if layer["k"] == layer["v"] else f"{layer['k']}/{layer['v']}" for layer in report["layers"]}
    )
    return (
        f"KV cache {', '.join(formats)}: {report['layers_rewritten']} layers, "
        f"{report['bits_per_element']:.4g} bits per element, "
        f"{report['bytes_per_token']:,.0f} bytes per token ({report['compression']:.3g}× smaller than f16)"
    )


def target_text(target: str | Mapping[str, Any]) -> str:
    """Return a target in short: its kind and what it was compiled for."""
    try:
        attributes = dict(target) if isinstance(target, Mapping) else json.loads(target)
    except ValueError:
        return str(target)
    name = attributes.get("arch") or attributes.get("mcpu")
    return f"{attributes.get('kind', '?')} ({name})" if name else str(attributes.get("kind", "?"))
