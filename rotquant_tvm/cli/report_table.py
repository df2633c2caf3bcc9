"""The compile report as a table: what is stored how, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.table import Table

from rotquant_tvm.cli.output import table

_SHOWN = ("k", "v", "kv_heads", "head_dim", "k_bits", "v_bits", "bytes_per_token", "f16_bytes_per_token", "tokens_kept")
_LENGTHS = ("8192", "32768")
"""The sequence lengths whose bytes are told where a window bounds them."""


def report_parts(report: Mapping[str, Any]) -> list[Table | str]:
    """Return the whole report as it is shown: what is stored how, in one line, and the kernels."""
    kernels = kernel_table(report)
    lines = [report_line(report), *filter(None, [fold_line(report)])]
    return [report_table(report), *lines, *([kernels] if kernels.row_count else [])]


def report_table(report: Mapping[str, Any]) -> Table:
    """Return one row per run of equal layers, and their total."""
    rows: list[list[object]] = []
    bounded = _bounded(report)
    for _, group in groupby(report["layers"], key=lambda layer: [layer.get(key) for key in _SHOWN]):
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
                *([first.get("tokens_kept") or "all"] if bounded else []),
            ]
        )
    if len(rows) > 1:
        total = [report["bytes_per_token"], report["f16_bytes_per_token"], f"{report['compression']:.3g}×"]
        rows.append(["all", "", "", "", None, None, *total, *([""] if bounded else [])])
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
        *(["tokens kept"] if bounded else []),
    ]
    return table("KV cache", columns, rows, left=4)


def _bounded(report: Mapping[str, Any]) -> list[int]:
    """The numbers of the layers that keep only a window."""
    return [layer["layer"] for layer in report["layers"] if layer.get("tokens_kept")]


def _window_text(report: Mapping[str, Any]) -> str:
    """What windows make of the cache; empty if there are none."""
    bounded = _bounded(report)
    if not bounded:
        return ""
    sizes = [
        f"{report['cache_bytes'][tokens]:,} bytes at {int(tokens):,} tokens "
        f"({report['f16_cache_bytes'][tokens] / report['cache_bytes'][tokens]:.3g}× smaller than f16)"
        for tokens in _LENGTHS
    ]
    return f"; layers {_spans(bounded)} keep only their window: a sequence takes {' and '.join(sizes)}"


def kernel_table(report: Mapping[str, Any]) -> Table:
    """Return one row per KV kernel: the layers and functions that use it, and where it comes from."""
    users: dict[str, list[int]] = {}
    kernels: dict[str, dict[str, Any]] = {}
    for layer in report["layers"]:
        for kernel in layer.get("kernels", ()):
            users.setdefault(kernel["kernel"], []).append(layer["layer"])
            kernels[kernel["kernel"]] = kernel
    rows = [
        [_spans(users[name]), kernel["operator"], name, _listed(kernel["functions"]), kernel["source"]]
        for name, kernel in kernels.items()
    ]
    return table("KV kernels", ["layers", "operator", "kernel", "used by", "from"], rows, left=5)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _spans(numbers: Sequence[int]) -> str:
    """Spell ascending numbers in short: ``0–3, 5``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("–".join(map(str, span)) for span in spans)


def report_line(report: Mapping[str, Any]) -> str:
    """Return the report in one line."""
    formats = sorted(
        {layer["k"] if layer["k"] == layer["v"] else f"{layer['k']}/{layer['v']}" for layer in report["layers"]}
    )
    policies = sorted({layer.get("policy", "") for layer in report["layers"]} - {""})
    sizes = ", ".join(f"{bits:.4g} at {int(tokens):,}" for tokens, bits in report.get("true_bits", {}).items())
    everything = f"; bits per element with 16-bit segments, by tokens: {sizes}" if policies else ""
    return (
        f"KV cache {', '.join(formats)}{''.join(f' ({policy})' for policy in policies)}: "
        f"{report['layers_rewritten']} layers, {report['bits_per_element']:.4g} bits per element, "
        f"{report['bytes_per_token']:,.0f} bytes per token ({report['compression']:.3g}× smaller than f16){everything}"
        f"{_window_text(report)}"
    )


def fold_line(report: Mapping[str, Any]) -> str:
    """Return in one line which weights have taken over rotations; empty where none were looked for."""
    spans: dict[str, list[int]] = {}
    for layer in report["layers"]:
        if folded := layer.get("folded"):
            spans.setdefault(f"K {folded['k']}, V {folded['v']}", []).append(layer["layer"])
    if not spans:
        return ""
    return "rotations in weights: " + " · ".join(f"layers {_spans(layers)}: {text}" for text, layers in spans.items())


def target_text(target: str | Mapping[str, Any]) -> str:
    """Return a target in short: its kind and what it was compiled for."""
    try:
        attributes = dict(target) if isinstance(target, Mapping) else json.loads(target)
    except (ValueError, RecursionError):
        return str(target)
    name = attributes.get("arch") or attributes.get("mcpu")
    return f"{attributes.get('kind', '?')} ({name})" if name else str(attributes.get("kind", "?"))
