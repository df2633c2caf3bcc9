"""Measure SmolLM2 on this CPU: decode and prefill against torch, and decode time over context length by cache format.

    python examples/measure_cpu.py model.gguf [--formats f16,rq3] [--contexts 256,1024,4096,8192]

All figures are medians of one run on all cores; contenders take turns, so that a slow minute of the machine hits all.
"""

from __future__ import annotations

import argparse
import statistics
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


def torch_runs(path: Path) -> tuple[Callable[[int], None], Callable[[np.ndarray], None]]:
    """(decode step, prefill) of the same model in torch: transformers with scaled_dot_product_attention, float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    cache = DynamicCache()

    @torch.no_grad()
    def decode(token: int) -> None:
        model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def prefill(ids: np.ndarray) -> None:
        model(torch.from_numpy(ids).long(), use_cache=True, logits_to_keep=1)

    return decode, prefill


def main() -> None:
    """Parse the arguments, measure, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--formats", default="f16,rq3")
    parser.add_argument("--contexts", default="256,1024,4096,8192")
    arguments = parser.parse_args()
    formats = arguments.formats.split(",")
    contexts = [int(c) for c in arguments.contexts.split(",")]
    console = Console()
    rng = np.random.default_rng(0)
    imported = rotquant_tvm.import_model(arguments.model)
    vocabulary = imported.config["vocab_size"]
    sessions = {}
    for name in formats:
        with console.status(f"compiling with {name}"):
            sessions[name] = rotquant_tvm.compile(imported, name).session(capacity=max(contexts))
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
    """Decode at short context and a prefill of 512 tokens, torch and compiled in turn."""
    decode, prefill = torch_runs(path)
    runs: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("torch", *sessions)}
    ids = rng.integers(0, vocabulary, (1, PREFILL))
    for _ in range(4):
        runs["torch"][1].append(seconds(lambda: prefill(ids)))
        for name, session in sessions.items():
            session.reset()
            runs[name][1].append(seconds(lambda s=session: s.prefill(ids)))
    for session in sessions.values():
        session.reset()
    # Blocks of steps rather than single ones: the first step after a switch pays for the other's cache lines.
    for _ in range(4):
        for name in runs:
            step = decode if name == "torch" else lambda t, s=sessions[name]: s.decode(np.array([t]))
            runs[name][0].extend(seconds(lambda t=t, f=step: f(t)) for t in rng.integers(0, vocabulary, 12).tolist())
    table = Table("", "decode ms", "of torch's speed", f"prefill {PREFILL}, ms", "of torch's speed")
    base = [statistics.median(values) for values in runs["torch"]]
    for name, values in runs.items():
        mine = [statistics.median(v) for v in values]
        cells = [f"{mine[0] * 1e3:.1f}", f"{base[0] / mine[0]:.2f}", f"{mine[1] * 1e3:.0f}", f"{base[1] / mine[1]:.2f}"]
        table.add_row(name, *cells)
    for session in sessions.values():
        session.reset()
    return table


if __name__ == "__main__":
    main()
