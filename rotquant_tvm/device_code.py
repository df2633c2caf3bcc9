"""CUDA code of a library, compiled to machine code for its target before the library is saved.

Without a driver TVM keeps kernels as CUDA source, to be compiled where the library is loaded: that takes TVM's
compiler, and nvcc or NVRTC, on every machine that it goes to. With one it compiles them for the device at hand,
whatever the target. So a cubin for the target replaces in the packed imports what is not for it.

The packed imports are (tvm-ffi's library format) a u64 of their size, two vectors of u64 that say which module imports
which, and for each module its kind and its bytes; a CUDA module's bytes are a format's name, a table of functions and
the code. Texts, vectors and bytes all begin with their number of entries as a u64, little endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from .cuda_compiler import KEEP_SOURCE, compile_error, cuda_compiler
from .environment_variables import environment_variable
from .runtime.requirements import runs_on
from .tuning.device_identity import same_arch

_HOST_CODE = "_lib"
"""The kind that stands, without bytes, for the modules whose code is linked."""

_MAGIC = (b"\x7fELF", b"\x50\xed\x55\xba")
"""How a cubin and a fatbin begin."""


@dataclass(frozen=True)
class PackedImports:
    """What a library carries beside the code that is linked.

    ``blob``: as TVM packs it. ``code``: the form of its CUDA code, ``"cubin"``, ``"fatbin"``, ``"ptx"`` or ``"cuda"``
    (source, since no CUDA compiler was found); None if it has none.
    """

    blob: bytes
    code: str | None
    llvm_target: str

    @classmethod
    def of(cls, module: Any, target: tvm.target.Target) -> PackedImports:
        """Pack the imports of a compiled ``tvm.runtime.Module``; raises DeviceError if CUDA code does not compile."""
        packed = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
        sources = [str(cuda.inspect_source("cuda")) for cuda in _modules(module, "cuda")]
        forms: list[str] = []
        parts: list[bytes] = []
        at = _skip_vectors(packed)
        parts.append(packed[8:at])
        for begin, kind, content in _entries(packed, at):
            if kind != "cuda" or content is None:
                parts.append(packed[begin : begin + _size(kind, content)])
                continue
            form, compiled = _compiled(content, sources[len(forms)], target)
            forms.append(form)
            parts.append(_text(kind) + _text(compiled))
        blob = b"".join(parts)
        llvm = next(iter(_modules(module, "llvm")))
        return cls(_u64(len(blob)) + blob, forms[0] if forms else None, str(llvm.get_function("_get_target_string")()))

    def write(self, _module: Any, system_lib: bool, prefix: str, folder: str) -> str:
        """Write them as an object file in ``folder``; the ``fpack_imports`` of TVM's ``export_library``."""
        path = Path(folder) / f"{prefix}devc.o"
        generate = tvm_ffi.get_global_func("codegen.codegen_blob")
        generate(self.blob, system_lib, self.llvm_target, prefix).write_to_file(str(path))
        return str(path)


@contextmanager
def kept_source(target: tvm.target.Target) -> Iterator[None]:
    """Let TVM keep CUDA code as source inside the block, if the device at hand could not run it.

    It would be compiled for that device, and instructions of another architecture refused.
    """
    version = _version_here()
    if target.kind.name != "cuda" or version is None or runs_on(str(target.attrs["arch"]), "cuda", version):
        yield
        return
    with environment_variable(KEEP_SOURCE, "1"):
        yield


def _version_here() -> str | None:
    """The compute capability of the device at hand; None if there is none."""
    return str(tvm.cuda(0).compute_version) if tvm.cuda(0).exist else None


def _compiled(content: bytes, source: str, target: tvm.target.Target) -> tuple[str, bytes]:
    """The form of a CUDA module's code, and the module's bytes, with machine code for the target."""
    form_end = 8 + struct.unpack_from("<Q", content)[0]
    form = content[8:form_end].decode()
    version = _version_here()
    made_here = version is not None and same_arch(str(target.attrs["arch"]), f"sm_{version.replace('.', '')}")
    compiler = None if form != "cuda" and (made_here or not source) else cuda_compiler()
    if compiler is None:
        return form, content
    functions = content[form_end : _code_begin(content, form_end, source)]
    return "cubin", _text("cubin") + functions + _text(_cubin(source, target, compiler))


def _code_begin(content: bytes, form_end: int, source: str) -> int:
    """Where the code of a CUDA module begins, its length before it, in the module's bytes."""
    text = _text(source)
    places = [len(content) - len(text)] if content.endswith(text) else []
    places += [at - 8 for magic in _MAGIC if (at := content.find(magic, form_end)) > 0]
    for at in places:
        if at >= form_end and at + 8 + struct.unpack_from("<Q", content, at)[0] == len(content):
            return at
    raise RuntimeError("TVM's packed CUDA module is not laid out as expected")


def _cubin(source: str, target: tvm.target.Target, compiler: str) -> bytes:
    from tvm.support import nvcc

    arch = str(target.attrs["arch"])
    try:
        with target:  # the options of both compilers depend on it
            return bytes(nvcc.compile_cuda(source, "cubin", arch=arch, compiler=compiler))
    except Exception as error:
        raise compile_error(compiler, arch, error) from error


def _modules(module: Any, kind: str) -> Iterator[Any]:
    """The modules of a kind among a module and its imports, in the order in which TVM packs them."""
    waiting = [module]
    while waiting:
        found = waiting.pop(0)
        if found.kind == kind:
            yield found
        waiting += list(found.imports)


def _skip_vectors(packed: bytes) -> int:
    """Where the modules begin in packed imports."""
    at = 8
    for _ in range(2):
        at += 8 + 8 * struct.unpack_from("<Q", packed, at)[0]
    return at


def _entries(packed: bytes, at: int) -> Iterator[tuple[int, str, bytes | None]]:
    """(begin, kind, bytes) of each module; the host code has none."""
    while at < len(packed):
        kind = _read(packed, at).decode()
        content = None if kind == _HOST_CODE else _read(packed, at + 8 + len(kind))
        yield at, kind, content
        at += _size(kind, content)


def _size(kind: str, content: bytes | None) -> int:
    return 8 + len(kind) + (0 if content is None else 8 + len(content))


def _read(packed: bytes, at: int) -> bytes:
    (size,) = struct.unpack_from("<Q", packed, at)
    if at + 8 + size > len(packed):
        raise RuntimeError("TVM's packed modules are not laid out as expected")
    return packed[at + 8 : at + 8 + size]


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def _text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return _u64(len(data)) + data
