"""List the KV formats: rotation, bits, gain rule, true size, and the head dimensions they take.

Bits per element count the 16-bit gains stored beside the codes. Bytes per token are those of the keys and
values of one kv head of one layer.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

from rotquant_tvm.cli.options import integer, words
from rotquant_tvm.cli.output import Output, table

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
    """Show the formats asked for; raises FormatError for an unknown one."""
    from rotquant_tvm.formats import KVFormat, known_formats

    names = arguments.formats or list(known_formats())
    dims = arguments.head_dims
    described = [_describe(name, KVFormat.parse(name), dims) for name in names]
    columns = ["format", "rotation", "gain", "head dims", "bits"]
    columns += [f"bits/el.\nd={dim}" for dim in dims] + [f"B/token\nd={dim}" for dim in dims]
    rows = [
        [
            entry["name"] if entry["same_as"] is None else f"{entry['name']} (= {entry['same_as']})",
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
    output.result({"formats": described}, table("", columns, rows, left=4))


def _head_dims(text: str) -> list[int]:
    return [integer(1)(word) for word in words()(text)]


def _describe(name: str, fmt: Any, dims: list[int]) -> dict[str, Any]:
    taken = _head_dims_taken(fmt)
    shown = [dim for dim in dims if dim in taken]
    return {
        "name": name,
        "same_as": None if fmt.name == name else fmt.name,
        "rotation": fmt.rotation,
        "codebook": fmt.codebook,
        "gain": fmt.gain,
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
    """Spell head dimensions in short: ``32–256 by 16`` if they are evenly spaced, else one by one."""
    steps = {after - before for before, after in pairwise(dims)}
    if len(steps) == 1 and len(dims) > 2:
        return f"{dims[0]}–{dims[-1]} by {steps.pop()}"
    return " ".join(map(str, dims))
