"""Compile the cases into libraries and write their arguments: ``python -m tests.sanitizer.build_kernels DIR``.

A sanitizer then watches a process that only loads them (``launch_kernels``). Names or families of cases may follow the
folder; ``--target llvm`` compiles for this CPU, ``--jobs`` says in how many processes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tvm
from tvm.target import Target

from rotquant_tvm.codegen import COUNTERS_ATTR, compile_module
from rotquant_tvm.linker import export_library
from rotquant_tvm.target import resolve_target

from ..schedules.cuda_targets import this_gpu
from .kernel_cases import KernelCase, kv_cases
from .layer_cases import layer_cases, search_cases, state_cases, vector_cases

PLAN = "cases.json"


def all_cases(kind: str) -> list[KernelCase]:
    """Every case that there is for a kind of target."""
    found = [*kv_cases(), *state_cases(), *layer_cases(), *vector_cases(), *search_cases()]
    return [case for case in found if kind == "cuda" or not case.cuda]


def selected(kind: str, words: Sequence[str]) -> list[KernelCase]:
    """The cases of these families or symbols; all of them for no words."""
    return [case for case in all_cases(kind) if not words or case.family in words or case.symbol in words]


def build(folder: Path, target: Target, words: Sequence[str] = (), part: int = 0, parts: int = 1) -> None:
    """Compile every ``parts``-th case into one library; a case whose kernel cannot be built is named and left out."""
    functions, plan, arrays = {}, {}, {}
    for case in selected(target.kind.name, words)[part::parts]:
        try:
            launch = case.launch()
            func = launch.build(target)
        except Exception as error:
            print(f"cannot build {case.symbol}: {error!r}", flush=True)
            continue
        counters = (func.attrs or {}).get(COUNTERS_ATTR)
        functions[case.symbol] = func.with_attr("global_symbol", case.symbol)
        arguments = list(launch.arrays)
        if counters is not None:
            arguments.insert(len(arguments) - launch.outputs, np.zeros(int(counters), np.int32))
        plan[case.symbol] = {"family": case.family, "arguments": len(arguments), "outputs": launch.outputs}
        arrays |= {f"{case.symbol}.{n}": array for n, array in enumerate(arguments)}
    if functions:
        export_library(compile_module(tvm.IRModule(functions), target), str(folder / f"part{part}.so"))
        np.savez(folder / f"part{part}.npz", **arrays)
    (folder / f"part{part}.json").write_text(json.dumps(plan))


def build_all(folder: Path, kind: str, words: Sequence[str] = (), jobs: int = 1) -> int:
    """Compile the cases in ``jobs`` processes; returns how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = max(1, min(jobs, len(selected(kind, words))))
    if jobs == 1:
        _build_part(folder, kind, words, 0, 1)
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            work = [pool.submit(_build_part, folder, kind, words, part, jobs) for part in range(jobs)]
            for part in work:
                part.result()
    plan = {name: {**entry, "part": part} for part in range(jobs) for name, entry in _plan(folder, part).items()}
    (folder / PLAN).write_text(json.dumps(plan, indent=1))
    return len(plan)


def _plan(folder: Path, part: int) -> dict:
    return json.loads((folder / f"part{part}.json").read_text())


def _build_part(folder: Path, kind: str, words: Sequence[str], part: int, parts: int) -> None:
    target = this_gpu() if kind == "cuda" else resolve_target("llvm -mcpu=x86-64-v3")
    build(folder, target, words, part, parts)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--target", choices=("cuda", "llvm"), default="cuda")
    parser.add_argument("--jobs", type=int, default=1)
    chosen = parser.parse_intermixed_args(argv)
    wanted, built = (
        len(selected(chosen.target, chosen.words)),
        build_all(chosen.folder, chosen.target, chosen.words, chosen.jobs),
    )
    print(f"{built} of {wanted} cases", flush=True)
    sys.exit(built < wanted)


if __name__ == "__main__":
    main()
