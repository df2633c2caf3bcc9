"""The check of a GGUF file before anything heavy reads it, and a load that parses its metadata once."""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from rotquant_tvm.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFSummary:
    """What the header of a GGUF file says; ``needed_bytes`` is the size that its tensors ask for."""

    architecture: str
    has_tokenizer: bool
    needed_bytes: int


class _Header:
    """A cursor over the header's bytes; reading past the end raises struct.error or IndexError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = 0

    def read(self, code: str, count: int = 1) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{count}{code}", self.data, self.offset)
        self.offset += struct.calcsize(f"<{count}{code}")
        return values

    def string(self) -> str:
        (length,) = self.read("Q")
        if self.offset + length > len(self.data):
            raise IndexError(length)
        self.offset += length
        return self.data[self.offset - length : self.offset].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """Read a scalar or a string; skip an array and give None."""
        if kind in _SCALARS:
            return self.read(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"its header has an entry of the unknown type {kind}")
        (element,), (count,) = self.read("I"), self.read("Q")
        if element in _SCALARS:
            self.offset += count * struct.calcsize("<" + _SCALARS[element])
        elif element == _STRING:
            for _ in range(count):
                self.string()
        else:
            raise ValueError(f"its header has an array of the unknown type {element}")
        return None


def read_summary(path: Path) -> GGUFSummary:
    """Read the header of a GGUF file and check that the file holds all of its tensors.

    Raises ModelError if the file is empty, not GGUF, of another version, or shorter than its header says.
    """
    try:
        if not path.stat().st_size:
            raise ModelError(f"{path} is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file (it does not start with 'GGUF')")
            size = len(data)
            summary = _walk(_Header(data), path)
    except (struct.error, IndexError, OverflowError) as error:
        raise ModelError(f"{path} is truncated: its header ends early; download it again") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if summary.needed_bytes > size:
        raise ModelError(
            f"{path} is truncated: its tensors need {summary.needed_bytes} bytes and it has {size}; "
            "download it again"
        )
    return summary


def _walk(header: _Header, path: Path) -> GGUFSummary:
    header.offset = 4
    (version,) = header.read("I")
    if version not in (2, 3):
        raise ModelError(f"{path} is GGUF version {version}; versions 2 and 3 can be read")
    tensors, fields = header.read("Q", 2)
    metadata = {}
    for _ in range(fields):
        key = header.string()
        (kind,) = header.read("I")
        metadata[key] = header.value(kind)
    end = total = 0
    for _ in range(tensors):
        name = header.string()
        (rank,) = header.read("I")
        elements = functools.reduce(int.__mul__, header.read("Q", rank), 1)
        (kind,), (offset,) = header.read("I"), header.read("Q")
        try:
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (KeyError, ValueError) as error:
            raise ModelError(f"{path}: the tensor {name!r} has the unknown type {kind}") from error
        stored = -(-elements // block) * block_bytes
        end, total = max(end, offset + stored), total + stored
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ModelError(f"{path}: its alignment (general.alignment) is {str(alignment)[:30]!r}, not a number of bytes")
    start = -(-header.offset // alignment) * alignment
    if start + end <= len(header.data) < total:  # all at once they would take more memory than the file has bytes
        raise ModelError(f"{path} is damaged: its tensors have {total} bytes in all and it has {len(header.data)}")
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelError(f"{path} does not name its architecture (general.architecture)")
    return GGUFSummary(architecture, "tokenizer.ggml.model" in metadata, start + end)


@contextmanager
def parsed_once() -> Iterator[None]:
    """Let transformers share one parse of a GGUF file among its config, weights and tokenizer.

    It builds a reader for each of the three and a table of tensor names for each submodule, which takes
    longer than reading the weights; for the time of one load both are remembered.
    """
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    remembered = {"GGUFReader": functools.cache(reader), "get_tensor_name_map": functools.cache(name_map)}
    vars(gguf).update(remembered)
    try:
        yield
    finally:
        vars(gguf).update(GGUFReader=reader, get_tensor_name_map=name_map)
