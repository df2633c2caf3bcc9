"""``tvmc run --prompt``: generate text, shown as it comes."""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from rotquant_tvm.cli import timing
from rotquant_tvm.cli.files import write_whole
from rotquant_tvm.cli.output import Output, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from rotquant_tvm.runtime import CompiledLibrary, Generation, GenerationStream, Session


@dataclass(frozen=True)
class _Run:
    """One generation with the seconds until its first token and after it."""

    generation: Generation
    prefill_seconds: float
    decode_seconds: float

    def speeds(self) -> dict[str, float | None]:
        """Tokens per second of the prompt and of the tokens after the first."""
        decoded = len(self.generation.ids) - 1
        return {
            "prefill_tokens_per_second": len(self.generation.prompt_ids) / self.prefill_seconds,
            "decode_tokens_per_second": decoded / self.decode_seconds if decoded else None,
        }


def run(arguments: argparse.Namespace, library: CompiledLibrary, output: Output) -> None:
    """Generate ``repeat × number`` times, showing the first, then the times and files asked for."""
    session = library.session(1, arguments.kv_capacity)
    runs: list[_Run] = []
    total = arguments.repeat * arguments.number

    def generate() -> None:
        if step is not None:
            step("generate")
        show = output.text if not runs else None
        runs.append(_generate(arguments, session, show))

    silent = output.as_json or total > 1
    with output.steps(total, "generate") if silent else nullcontext() as step:
        seconds = timing.measure(generate, arguments.repeat, arguments.number)
    output.text("\n")
    _show(arguments, library, session, runs, seconds, output)


def _generate(arguments: argparse.Namespace, session: Session, show: Callable[[str], None] | None) -> _Run:
    stream = _stream(arguments, session)
    since = time.perf_counter()
    first = since
    for count, chunk in enumerate(stream):
        if not count:
            first = time.perf_counter()
        if show is not None:
            show(chunk.text)
    return _Run(stream.results[0], first - since, time.perf_counter() - first)


def _stream(arguments: argparse.Namespace, session: Session) -> GenerationStream:
    return session.stream(
        arguments.prompt,
        arguments.max_tokens,
        arguments.temperature,
        arguments.top_p,
        arguments.seed,
        arguments.stop,
        arguments.chat,
    )


def _show(
    arguments: argparse.Namespace,
    library: CompiledLibrary,
    session: Session,
    runs: list[_Run],
    seconds: list[float],
    output: Output,
) -> None:
    generation = runs[0].generation
    document: dict[str, Any] = {
        "mode": "generate",
        "text": generation.text,
        "ids": list(generation.ids),
        "prompt_tokens": len(generation.prompt_ids),
        "finish_reason": generation.finish_reason,
        "capacity": session.capacity,
        "kv_bytes": session.kv_bytes(),
        "time_ms": timing.summarize(seconds),
        **runs[-1].speeds(),
    }
    shown: list[Table | str] = []
    if arguments.print_time:
        shown += [timing.time_table(document["time_ms"]), _speed_table(runs)]
    if arguments.profile:
        document["profile"] = _profile(arguments, library)
        shown.append(timing.profile_table(document["profile"]))
    if arguments.outputs is not None:
        ids, prompt_ids = np.array(generation.ids), np.array(generation.prompt_ids)
        write_whole(arguments.outputs, lambda file: np.savez(file, ids=ids, prompt_ids=prompt_ids), "--outputs")
        document["outputs"] = str(arguments.outputs)
        output.note(f"wrote {arguments.outputs}")
    output.result(document, *shown)


def _speed_table(runs: list[_Run]) -> Table:
    rows = []
    for index, each in enumerate(runs):
        speeds = each.speeds()
        prompt, new = len(each.generation.prompt_ids), len(each.generation.ids)
        rows.append(
            [
                index,
                prompt,
                new,
                f"{speeds['prefill_tokens_per_second']:.1f}",
                "–" if new < 2 else f"{speeds['decode_tokens_per_second']:.1f}",
            ]
        )
    columns = ["run", "prompt tokens", "new tokens", "prefill tokens/s", "decode tokens/s"]
    return table("speed", columns, rows, left=0)


def _profile(arguments: argparse.Namespace, library: CompiledLibrary) -> list[dict[str, Any]]:
    profile = timing.KernelProfile(library.device)
    session = library.session(1, arguments.kv_capacity)
    _generate(arguments, session, None)  # the first run allocates
    session.instrument(profile.instrument)
    stream = _stream(arguments, session)
    with profile.phase("prefill"):
        next(stream)
    with profile.phase("decode"):
        for _ in stream:
            pass
    return profile.kernels()
