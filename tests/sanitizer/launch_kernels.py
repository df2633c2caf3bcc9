"""Load the libraries of ``build_kernels`` and launch every case once: the process that a sanitizer watches.

``python launch_kernels.py DIR [--cpu] [--poison] [--share=I/N] [WORD …]``. It needs NumPy and TVM's runtime alone, and
prints a line per case. Words are families and symbols of cases; a share is every N-th of them. Outputs are memory that
nothing has written; with ``--poison`` every bit of them is set, which is NaN, and a case fails that leaves some of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")

import numpy as np
import tvm
from tvm_ffi.libinfo import load_lib_ctypes

KEPT: list[object] = []
"""Libraries that must stay loaded."""


def main(words: list[str]) -> int:
    """Launch the cases; the number of those that left some of their output."""
    options = {word.partition("=")[0]: word.partition("=")[2] for word in words if word.startswith("--")}
    folder, *names = [word for word in words if not word.startswith("--")]
    share, shares = map(int, options.get("--share", "0/1").split("/"))
    device = tvm.cpu() if "--cpu" in options else _cuda()
    plan = json.loads((Path(folder) / "cases.json").read_text())
    wanted = [name for name, entry in plan.items() if not names or name in names or entry["family"] in names]
    libraries: dict[int, tuple] = {}
    failed = 0
    for symbol in wanted[share::shares]:
        part = plan[symbol]["part"]
        if part not in libraries:
            path = Path(folder) / f"part{part}.so"
            libraries[part] = tvm.runtime.load_module(str(path)), np.load(path.with_suffix(".npz"))
        left = _launch(symbol, plan[symbol], *libraries[part], device, "--poison" in options)
        failed += left > 0
        print(f"launched {symbol}" + (f": {left} elements of its output were not written" if left else ""), flush=True)
    return failed


def _cuda() -> tvm.runtime.Device:
    """The first GPU; ``TVM_USE_RUNTIME_LIB`` leaves its part of the runtime out."""
    paths = tvm.libinfo.package_lib_paths()
    KEPT.append(load_lib_ctypes("tvm", "tvm_runtime_cuda", "RTLD_LOCAL", extra_lib_paths=paths))
    return tvm.cuda(0)


def _launch(symbol: str, entry: dict, library, stored, device, poison: bool) -> int:
    """Launch a case; how many elements of its outputs are still poison."""
    arrays = [stored[f"{symbol}.{n}"] for n in range(entry["arguments"])]
    tensors = _tensors(arrays, entry["outputs"], device, poison)
    library[symbol](*tensors)
    device.sync()
    results = [tensor.numpy() for tensor in tensors[len(tensors) - entry["outputs"] :]]
    return sum(map(_left, results)) if poison else 0


def _tensors(arrays, outputs, device, poison):
    inputs = [tvm.runtime.tensor(array, device) for array in arrays[: len(arrays) - outputs]]
    results = []
    for array in arrays[len(arrays) - outputs :]:
        empty = tvm.runtime.empty(array.shape, str(array.dtype), device)
        if poison:
            empty.copyfrom(np.full(array.nbytes, 0xFF, np.uint8).view(array.dtype).reshape(array.shape))
        results.append(empty)
    return inputs + results


def _left(result: np.ndarray) -> int:
    """How many elements are NaN; of integers, which may have any bits, all or none."""
    if result.dtype.kind == "f":
        return int(np.isnan(result).sum())
    return result.size if (result.view(np.uint8) == 0xFF).all() else 0


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
