"""``--dump-code``: what the compile went through and came to, as files beside the artifact."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rotquant_tvm.cli.files import check_file, write_whole
from rotquant_tvm.errors import DeviceError, UsageError

if TYPE_CHECKING:
    import tvm

KINDS = ("ir", "tir", "ll", "asm", "cuda", "ptx")
_BY_TARGET = {"llvm": ("ir", "tir", "ll", "asm"), "cuda": ("ir", "tir", "ll", "asm", "cuda", "ptx")}


def check_kinds(kinds: list[str], target: tvm.target.Target) -> None:
    """Raise UsageError for a kind of code that a target does not have."""
    has = _BY_TARGET[target.kind.name]
    for kind in kinds:
        if kind not in has:
            raise UsageError(f"--dump-code {kind}: target {target.kind.name} has {', '.join(has)}")


def dump_path(artifact: Path, kind: str) -> Path:
    """Return where the code of a kind is written."""
    return artifact.with_name(f"{artifact.name}.{kind}")


def check_dumps(artifact: Path, kinds: list[str]) -> None:
    """Raise UsageError if a file of code could not be written; an artifact's folder may yet be made."""
    if artifact.parent.is_dir():
        for kind in kinds:
            check_file(dump_path(artifact, kind), "--dump-code")


def collect_code(
    kinds: list[str],
    graph: tvm.IRModule | None,
    scheduled: tvm.IRModule | None,
    library: Any,
    target: tvm.target.Target,
) -> dict[str, str]:
    """Return the code of each kind.

    ``graph``: the module after the KV-cache passes; ``scheduled``: after scheduling; ``library``: the
    compiled ``tvm.runtime.Module``. Raises DeviceError if CUDA code cannot be compiled to PTX here.
    """
    makers: dict[str, Callable[[], str]] = {
        "ir": lambda: _script(graph),
        "tir": lambda: _script(_kernels(scheduled)),
        "ll": lambda: _source(library, "llvm", "ll"),
        "asm": lambda: _source(library, "llvm", "asm"),
        "cuda": lambda: _source(library, "cuda", ""),
        "ptx": lambda: _ptx(_source(library, "cuda", ""), target),
    }
    return {kind: makers[kind]() for kind in kinds}


def write_code(artifact: Path, code: dict[str, str]) -> list[Path]:
    """Write the files and return their paths."""
    paths = []
    for kind, text in code.items():
        path = dump_path(artifact, kind)
        write_whole(path, partial(_write_text, text), "--dump-code")
        paths.append(path)
    return paths


def _write_text(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def _script(mod: tvm.IRModule | None) -> str:
    if mod is None:
        raise UsageError("--dump-code: the pass whose result was to be written is disabled")
    return str(mod.script(show_meta=False)) + "\n"


def _kernels(mod: tvm.IRModule | None) -> tvm.IRModule | None:
    import tvm

    if mod is None:
        return None
    return tvm.IRModule({name: f for name, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)})


def _source(library: Any, kind: str, form: str) -> str:
    modules, found = [library], []
    while modules:
        module = modules.pop(0)
        modules += list(module.imports)
        if module.kind == kind:
            found.append(str(module.inspect_source(form)))
    return "\n".join(found)


def _ptx(source: str, target: tvm.target.Target) -> str:
    from tvm.support import nvcc

    compiler = "nvcc" if shutil.which("nvcc") else "nvrtc"
    try:
        with target:  # it reads the architecture from there
            code = nvcc.compile_cuda(source, "ptx", arch=str(target.attrs["arch"]), compiler=compiler)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DeviceError(
            f"--dump-code ptx: {compiler} cannot compile the CUDA code here ({reason}); install the CUDA "
            "toolkit or drop ptx"
        ) from error
    return bytes(code).decode()
