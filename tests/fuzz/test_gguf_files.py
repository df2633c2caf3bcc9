"""GGUF files of any content: headers of other counts, kinds, sizes and places, and any bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import gguf
import pytest
import torch
from hypothesis import strategies as st

from rotquant_tvm.frontend import import_model
from rotquant_tvm.frontend.gguf_file import read_summary
from rotquant_tvm.frontend.hf import load

from .fuzzing import forms, fuzz, mutated
from .model_files import VOCABULARY, WIDTH, gguf_file
from .reading import read

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
COUNTS = st.sampled_from((0, 1, 2, 3, 8, 64, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**63, 2**64 - 1))
SHARES = st.integers(0, 99).map(lambda number: number < 3)
"""How many inputs are imported to the end, where the reader takes them."""


def packed(kind: int, value: Any) -> bytes:
    """A value of the metadata; numbers that do not fit wrap around."""
    if kind == STRING:
        text = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text
    if kind == ARRAY:
        element, values = value
        return struct.pack("<IQ", element, len(values)) + b"".join(packed(element, each) for each in values)
    code = CODES.get(kind, "I")
    if code in "fd":
        return struct.pack("<" + code, float("inf") if code == "f" and abs(value) > 3e38 else value)
    size = struct.calcsize(code)
    return (int(value) % 2 ** (8 * size)).to_bytes(size, "little")


@dataclass
class Parts:
    """A GGUF file taken apart: ``fields`` (name, kind, value), ``tensors`` (name, sizes, kind, offset)."""

    fields: list[list[Any]]
    tensors: list[list[Any]]
    data: bytes
    counts: list[int] = field(default_factory=list)
    version: int = 3

    def joined(self) -> bytes:
        """The bytes of the file; ``counts`` replace the true numbers of tensors and fields."""
        tensors, fields = [*self.counts, len(self.tensors), len(self.fields)][:2]
        content = b"GGUF" + struct.pack("<IQQ", self.version, tensors, fields)
        for name, kind, value in self.fields:
            content += packed(STRING, name) + struct.pack("<I", kind) + packed(kind, value)
        for name, sizes, kind, offset in self.tensors:
            content += packed(STRING, name) + struct.pack("<I", len(sizes))
            content += b"".join(packed(10, size) for size in sizes) + packed(4, kind) + packed(10, offset)
        return content + bytes(-len(content) % 32) + self.data


def valid_parts(path) -> Parts:
    """The valid file taken apart."""
    path.write_bytes(gguf_file())
    reader = gguf.GGUFReader(path)
    fields = []
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF."):
            kinds, value = [int(kind) for kind in entry.types], entry.contents()
            fields.append([name, kinds[0], (kinds[1], list(value)) if kinds[0] == ARRAY else value])
    start = reader.data_offset
    tensors = [
        [tensor.name, [int(size) for size in tensor.shape], int(tensor.tensor_type), tensor.data_offset - start]
        for tensor in reader.tensors
    ]
    return Parts(fields, tensors, gguf_file()[start:])


@st.composite
def changed_parts(draw: st.DrawFn, valid: Parts) -> bytes:
    """A file of which some fields or tensors are others, gone, or told twice."""
    parts = Parts([list(each) for each in valid.fields], [list(each) for each in valid.tensors], valid.data)
    for _ in range(draw(st.integers(1, 3))):
        change_field(draw, parts) if draw(st.booleans()) else change_tensor(draw, parts)
    if not draw(st.integers(0, 9)):
        parts.counts = draw(st.lists(COUNTS | st.integers(0, 40), min_size=1, max_size=2))
    if not draw(st.integers(0, 19)):
        parts.version = draw(st.sampled_from((0, 1, 2, 4, 3 << 24)))
    return parts.joined()


def change_field(draw: st.DrawFn, parts: Parts) -> None:
    """Give an entry of the metadata another value, kind or name."""
    if not parts.fields:
        return
    at = draw(st.integers(0, len(parts.fields) - 1))
    entry = parts.fields[at]
    action = draw(st.sampled_from(("value", "value", "value", "kind", "gone", "twice", "name")))
    if action == "gone":
        del parts.fields[at]
    elif action == "twice":
        parts.fields.insert(draw(st.integers(0, len(parts.fields))), list(entry))
    elif action == "name":
        entry[0] = draw(st.text(max_size=8) | st.sampled_from(("general.alignment", "general.architecture", "llama")))
    elif action == "kind":
        entry[1], entry[2] = draw(values())
    elif entry[1] == STRING:
        entry[2] = draw(st.binary(max_size=8) | st.sampled_from(("llama", "gpt2", "qwen2", "t5", "mamba", "bert", "x")))
    elif entry[1] == ARRAY:
        element, some = entry[2]
        cut = some[: draw(st.integers(0, len(some)))]
        more = draw(st.lists(st.binary(max_size=4) if element == STRING else COUNTS, max_size=3))
        entry[2] = (element, draw(st.sampled_from((cut, some + more, cut + some, []))))
    else:
        entry[2] = draw(COUNTS | st.floats() if CODES.get(entry[1]) in ("f", "d") else COUNTS)


def values() -> st.SearchStrategy[tuple[int, Any]]:
    """A value of the metadata with its kind; some kinds are none."""
    numbers = st.tuples(st.sampled_from((*CODES, 13, 99)), COUNTS)
    texts = st.tuples(st.just(STRING), st.binary(max_size=20))
    plain = numbers | texts
    nested = st.recursive(
        plain.map(lambda pair: (ARRAY, (pair[0], [pair[1]] * 2))),
        lambda inner: inner.map(lambda pair: (ARRAY, (ARRAY, [pair[1]] * 2))),
        max_leaves=4,
    )
    return plain | nested


def change_tensor(draw: st.DrawFn, parts: Parts) -> None:
    """Give a tensor other sizes, another kind, place or name."""
    if not parts.tensors:
        return
    at = draw(st.integers(0, len(parts.tensors) - 1))
    tensor = parts.tensors[at]
    action = draw(st.sampled_from(("sizes", "sizes", "kind", "offset", "gone", "twice", "name", "many")))
    if action == "sizes":
        sizes = COUNTS | st.sampled_from((VOCABULARY, WIDTH, 32, 256))
        tensor[1] = draw(st.lists(sizes, max_size=5) | st.just([1] * 40))
    elif action == "kind":
        tensor[2] = draw(st.integers(0, 45) | COUNTS)
    elif action == "offset":
        tensor[3] = draw(COUNTS | st.integers(0, len(parts.data)))
    elif action == "gone":
        del parts.tensors[at]
    elif action == "twice":
        parts.tensors.append(list(tensor))
    elif action == "name":
        tensor[0] = draw(st.text(max_size=8) | st.sampled_from([each[0] for each in parts.tensors]))
    else:
        size = len(parts.data) // 4
        parts.tensors += [[f"blk.{n}.ffn_up.weight", [size], 0, 0] for n in range(draw(st.sampled_from((9, 3000))))]


@pytest.fixture
def path(tmp_path):
    """A valid file; the first reading of a process takes up what the packages need."""
    (tmp_path / "model.gguf").write_bytes(valid_parts(tmp_path / "model.gguf").joined())
    assert import_model(tmp_path / "model.gguf").tokenizer is not None
    return tmp_path / "model.gguf"


def read_file(path, content: bytes, whole: bool) -> None:
    """Read a file as imports do, some to the end."""
    path.write_bytes(content)
    summary = read(lambda: read_summary(path))
    assert summary is None or summary.needed_bytes <= len(content)
    if read(lambda: load(path, torch.float32)) is not None:
        assert summary is not None
        if whole:
            read(lambda: import_model(path))


@forms(40, 6_000)
def test_files_of_other_fields_and_tensors(examples, path):
    cases = st.tuples(changed_parts(valid_parts(path)), SHARES)
    fuzz("GGUF (fields and tensors)", cases, lambda case: read_file(path, *case), examples)


@forms(40, 4_000)
def test_files_of_any_bytes(examples, path):
    content = gguf_file()
    start = gguf.GGUFReader(path).data_offset
    numbers = tuple(struct.pack("<Q", number) for number in (0, 1, 2**31, 2**32, 2**48, 2**63, 2**64 - 1))
    head = mutated(st.just(content[:start]), numbers).map(lambda part: part + content[start:])
    cases = st.tuples(head | mutated(st.just(content), numbers), SHARES)
    fuzz("GGUF (bytes)", cases, lambda case: read_file(path, *case), examples)
