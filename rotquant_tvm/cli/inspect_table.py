"""What ``tvmc inspect`` shows of a model's attention sites and near misses, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from rotquant_tvm.cli.output import table

_COLUMNS = ("site", "verdict", "mask", "rotary", "K", "V", "heads", "kv heads", "head dim", "scale", "soft cap")


def inspected_parts(document: Mapping[str, Any], only: int | None = None) -> list[Table | str]:
    """Return the tables of a model's description (``InspectedModel.describe``); ``only``: of this site alone."""
    sites = [site for site in document["sites"] if only in (None, site["index"])]
    parts: list[Table | str] = [table("attention", _COLUMNS, [_row(site) for site in sites], left=6)]
    if misses := document["near_misses"]:
        rows = [[miss["variable"], miss["operator"], miss["reason"]] for miss in misses]
        parts.append(table("near misses", ["variable", "broken by", "reason"], rows, left=3))
    count = sum(site["verdict"] == "quantize" for site in document["sites"])
    kept = sum(site["verdict"] == "keep" for site in document["sites"])
    line = f"{document['model_type']}: {count} of {len(document['sites'])} attention sites can have a packed KV cache"
    return [*parts, *document["notes"], line + (f", {kept} keep K or V in 16 bits" if kept else "")]


def _row(site: Mapping[str, Any]) -> list[object]:
    return [
        site["index"],
        site["verdict"] + (f": {site['reason']}" if site["reason"] else ""),
        site["mask"] + (f" {site['window']}" if site["window"] else ""),
        _rotary_text(site["rotary"]),
        site["k"],
        site["v"],
        site["heads"],
        site["kv_heads"],
        site["head_dim"],
        site["scale"],
        site["softcap"],
    ]


def _rotary_text(rotary: Mapping[str, Any] | None) -> str:
    if rotary is None:
        return "unknown"
    if rotary["kind"] == "none":
        return "none"
    dims = "" if rotary["kind"] == "full" else f" {rotary['dims']} dims"
    return f"{rotary['kind']}{dims}, {rotary['pairs']}"
