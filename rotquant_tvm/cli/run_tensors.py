"""``tvmc run`` over token ids: one prefill, from a file or filled in."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from rotquant_tvm.cli import timing
from rotquant_tvm.cli.files import write_whole
from rotquant_tvm.cli.output import Output, table
from rotquant_tvm.cli.tensor_files import token_rows

if TYPE_CHECKING:
    from rotquant_tvm.runtime import CompiledLibrary


def run(arguments: argparse.Namespace, arrays: dict[str, np.ndarray], library: CompiledLibrary, output: Output) -> None:
    """Prefill ``repeat × number`` times, show the likeliest next token of each row, write the outputs."""
    info = library.info
    rows = token_rows(arrays, arguments.fill_mode, info.vocab_size, info.batch or 1)
    longest = max(len(row) for row in rows)
    capacity = arguments.kv_capacity or max(longest, min(library.default_capacity, 32))
    session = library.session(len(rows), capacity)
    logits: list[np.ndarray] = []

    def prefill() -> None:
        session.reset()
        logits[:] = [session.prefill(rows)]

    with output.steps(None, "prefill") as step:
        step("prefill")
        seconds = timing.measure(prefill, arguments.repeat, arguments.number)
    likeliest = [int(np.nanargmax(row)) if np.isfinite(row).any() else None for row in logits[0]]
    document: dict[str, Any] = {
        "mode": "prefill",
        "tokens": [len(row) for row in rows],
        "likeliest_next": likeliest,
        "capacity": capacity,
        "kv_bytes": session.kv_bytes(),
        "time_ms": timing.summarize(seconds),
    }
    cells = [[index, len(row), likeliest[index]] for index, row in enumerate(rows)]
    shown: list[Table | str] = [table("", ["row", "tokens", "likeliest next id"], cells, left=0)]
    if arguments.print_time:
        shown.append(timing.time_table(document["time_ms"]))
    if arguments.profile:
        document["profile"] = _profile(library, rows, capacity)
        shown.append(timing.profile_table(document["profile"]))
    if arguments.outputs is not None:
        found, lengths = logits[0], session.lengths
        write_whole(arguments.outputs, lambda file: np.savez(file, logits=found, lengths=lengths), "--outputs")
        document["outputs"] = str(arguments.outputs)
        shown.append(f"wrote {arguments.outputs}")
    output.result(document, *shown)


def _profile(library: CompiledLibrary, rows: list[np.ndarray], capacity: int) -> list[dict[str, Any]]:
    profile = timing.KernelProfile(library.device)
    session = library.session(len(rows), capacity)
    session.prefill(rows)  # the first run allocates
    session.reset()
    session.instrument(profile.instrument)
    with profile.phase("prefill"):
        session.prefill(rows)
    return profile.kernels()
