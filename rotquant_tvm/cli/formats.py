"""List the KV formats: rotation, bits, gain rule, true size, and the head dimensions they take.

Bits per element count the 16-bit gains stored beside the codes. Bytes per token are those of the keys and
values of one kv head of one layer. Presets are listed again with the formats of K and V and the cache policy
that they stand for; the sizes shown are those of quantized tokens, without means and 16-bit tokens.

For example:
  tvmc formats
  tvmc formats rq3 iso3 q8_0 --head-dims 128
  tvmc formats --json
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rotquant_tvm.cli.options import integer, words
from rotquant_tvm.cli.output import Output, table

if TYPE_CHECKING:
    from rich.table import Table

SUMMARY = "list the KV formats and their true sizes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tvmc formats``."""
    parser.add_argument("formats", metavar="FORMAT", nargs="*", help="formats to show (default: all)")
    parser.add_argument(
        "--head-dims",
        metavar="D,…",
        type=_head_dims,
        default=[64, 128, 256],
        help="head dimensions to show sizes for (default: 64,128,256)",
    )


def execute(arguments: argparse.Namespace, output: Output) -> None:
    """Show the formats asked for; raises FormatError for an unknown one and for a head dimension that none takes."""
    from rotquant_tvm.formats import KVFormat, known_formats

    names = arguments.formats or list(known_formats())
    dims = arguments.head_dims
    _check_head_dims(dims)
    described = [_describe(name, KVFormat.parse(name), dims) for name in names]
    presets = [_describe_preset(entry) for entry in described if entry["preset"]]
    columns = ["format", "rotation", "gain", "head dims", "bits"]
    columns += [f"bits/el.\nd={dim}" for dim in dims] + [f"B/token\nd={dim}" for dim in dims]
    rows = [
        [
            _shown_name(entry),
            entry["rotation"],
            entry["gain"],
            entry["head_dims_text"],
            entry["bits"],
            *(entry["bits_per_element"].get(str(dim), "–") for dim in dims),
            *(entry["bytes_per_token"].get(str(dim), "–") for dim in dims),
        ]
        for entry in described
    ]
    for entry in described:
        del entry["head_dims_text"]
    shown: list[Table | str] = [table("", columns, rows, left=4)]
    if presets:
        preset_rows = [[preset["name"], preset["k"], preset["v"], preset["policy"]] for preset in presets]
        shown += ["", table("presets", ["preset", "K", "V", "cache policy"], preset_rows, left=4)]
    output.result({"formats": described, "presets": presets}, *shown)


def _shown_name(entry: dict[str, Any]) -> str:
    if entry["preset"]:
        return f"{entry['name']} (preset)"
    return entry["name"] if entry["same_as"] is None else f"{entry['name']} (= {entry['same_as']})"


def _head_dims(text: str) -> list[int]:
    return [integer(1)(word) for word in words()(text)]


def _check_head_dims(dims: list[int]) -> None:
    from rotquant_tvm.errors import FormatError
    from rotquant_tvm.formats import HEAD_DIMS
    from rotquant_tvm.formats.kv_format import TAKEN_HEAD_DIMS

    for dim in dims:
        if dim not in HEAD_DIMS:
            raise FormatError(f"--head-dims: no format takes head_dim {dim}; {TAKEN_HEAD_DIMS}")


def _describe_preset(entry: dict[str, Any]) -> dict[str, str]:
    """What a cache of that name is: the formats and the policy, spelled as --kv-cache takes them."""
    from rotquant_tvm.kv_cache_config import KVCacheConfig

    config = KVCacheConfig.parse(entry["name"])
    return {
        "name": entry["name"],
        "k": config.formats.k.name,
        "v": config.formats.v.name,
        "policy": config.policy.name,
    }


def _describe(name: str, fmt: Any, dims: list[int]) -> dict[str, Any]:
    from rotquant_tvm.formats import parse_pair
    from rotquant_tvm.kv_cache_config import PRESETS

    preset = name in PRESETS
    k, v = parse_pair(name) if preset else (fmt, fmt)
    taken = _head_dims_taken(fmt)
    shown = [dim for dim in dims if dim in taken]
    return {
        "name": name,
        "preset": preset,
        "same_as": None if preset or fmt.name == name else fmt.name,
        "rotation": fmt.rotation,
        "codebook": fmt.codebook,
        "gain": k.gain if k.gain == v.gain else f"{k.gain}/{v.gain}",
        "bits": _bits_per_code(fmt),
        "head_dims": taken,
        "head_dims_text": _span(taken),
        "bits_per_element": {str(dim): fmt.bits_per_element(dim) for dim in shown},
        "bytes_per_token": {str(dim): 2 * dim * fmt.bits_per_element(dim) / 8 for dim in shown},
    }


def _bits_per_code(fmt: Any) -> int | float:
    """Bits per code on average over the channels, a sketch's signs included."""
    bits = fmt.bits + fmt.plane_dims(64) / 64
    return int(bits) if bits == int(bits) else bits


def _head_dims_taken(fmt: Any) -> list[int]:
    from rotquant_tvm.errors import FormatError
    from rotquant_tvm.formats import HEAD_DIMS

    taken = []
    for dim in HEAD_DIMS:
        try:
            fmt.check(dim)
        except FormatError:
            continue
        taken.append(dim)
    return taken


def _span(dims: list[int]) -> str:
    """Spell head dimensions in short: ``32–256 by 16, 512`` if they are evenly spaced but the last, else one by one."""
    for count in (len(dims), len(dims) - 1):
        steps = {after - before for before, after in pairwise(dims[:count])}
        if len(steps) == 1 and count > 2:
            rest = "".join(f", {dim}" for dim in dims[count:])
            return f"{dims[0]}–{dims[count - 1]} by {steps.pop()}{rest}"
    return " ".join(map(str, dims))
