"""Measure SmolLM2 on this CPU: decode and prefill against torch, and decode time over context length by cache format.

    python examples/measure_cpu.py model.gguf [--formats f16,rq3] [--contexts 256,1024,4096,8192] [--no-torch]

All figures are medians of one run on all cores; contenders take turns, so that a slow minute of the machine hits all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import rotquant_tvm

PREFILL = 512
STEPS = 24


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_torch(path: Path, ids: list[int]) -> dict[str, list[float]]:
    """Seconds per decode step and per prefill of the same model in torch: transformers with SDPA, float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    cache = DynamicCache()
    with torch.no_grad():
        row = torch.tensor([ids])
        prefill = [seconds(lambda: model(row, use_cache=True, logits_to_keep=1)) for _ in range(4)]
        step = [
            seconds(lambda t=t: model(torch.tensor([[t]]), past_key_values=cache, use_cache=True)) for t in ids[:48]
        ]
    return {"decode": step[8:], "prefill": prefill[1:]}


def torch_apart(path: Path, ids: list[int]) -> dict[str, list[float]]:
    """``measure_torch`` in a process of its own: in one process the two thread pools slow each other down."""
    command = [sys.executable, __file__, str(path), "--torch-ids", json.dumps(ids)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Parse the arguments, measure, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--formats", default="f16,rq3")
    parser.add_argument("--contexts", default="256,1024,4096,8192")
    parser.add_argument("--no-torch", action="store_true", help="leave the comparison with torch out")
    parser.add_argument("--torch-ids", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.torch_ids:
        print(json.dumps(measure_torch(arguments.model, arguments.torch_ids)))
        return
    formats = arguments.formats.split(",")
    contexts = [int(c) for c in arguments.contexts.split(",")]
    console = Console()
    rng = np.random.default_rng(0)
    imported = rotquant_tvm.import_model(arguments.model)
    vocabulary = imported.config["vocab_size"]
    sessions = {}
    for name in formats:
        with console.status(f"compiling with {name}"):
            sessions[name] = rotquant_tvm.compile(imported, name).session(capacity=max(*contexts, PREFILL))
    if not arguments.no_torch:
        console.print(against_torch(arguments.model, sessions, vocabulary, rng))
    table = Table("context", *(f"{name}, ms" for name in formats), *(f"{n} / {formats[0]}" for n in formats[1:]))
    for context in contexts:
        with console.status(f"context {context}"):
            for session in sessions.values():
                ids = rng.integers(0, vocabulary, (1, context - 1 - int(session.lengths[0])))
                session.prefill(ids)
            times = {name: [] for name in formats}
            for _ in range(STEPS):
                for name, session in sessions.items():
                    times[name].append(seconds(lambda s=session: s.decode(rng.integers(0, vocabulary, 1))))
                    session.crop(context - 1)
        middle = {name: statistics.median(values) * 1e3 for name, values in times.items()}
        ratios = [f"{middle[name] / middle[formats[0]]:.2f}" for name in formats[1:]]
        table.add_row(str(context), *(f"{middle[name]:.1f}" for name in formats), *ratios)
    console.print(table)


def against_torch(path: Path, sessions: dict, vocabulary: int, rng: np.random.Generator) -> Table:
    """Decode at short context and a prefill of 512 tokens: torch, ours, torch again."""
    ids = rng.integers(0, vocabulary, PREFILL)
    runs = {"torch": torch_apart(path, ids.tolist())}
    for name, session in sessions.items():
        runs[name] = {"decode": [], "prefill": []}
        for _ in range(4):
            session.reset()
            runs[name]["prefill"].append(seconds(lambda s=session: s.prefill(ids[None])))
        session.reset()
        for token in ids[:48]:
            runs[name]["decode"].append(seconds(lambda t=token, s=session: s.decode(np.array([t]))))
        session.reset()
    for kind, values in torch_apart(path, ids.tolist()).items():
        runs["torch"][kind] += values
    table = Table("", "decode ms", "of torch's speed", f"prefill {PREFILL}, ms", "of torch's speed")
    base = [statistics.median(runs["torch"][kind]) for kind in ("decode", "prefill")]
    for name, values in runs.items():
        mine = [statistics.median(values[kind]) for kind in ("decode", "prefill")]
        cells = [f"{mine[0] * 1e3:.1f}", f"{base[0] / mine[0]:.2f}", f"{mine[1] * 1e3:.0f}", f"{base[1] / mine[1]:.2f}"]
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    main()
