"""Exported programs (.pt2 files) of any content: archives, graphs, lists of tensors. Nothing in one is ever run."""

from __future__ import annotations

import json
import os
import pickle
import struct

import pytest
from hypothesis import strategies as st

from rotquant_tvm.frontend import import_model
from rotquant_tvm.frontend.pt2_file import CONFIGS, CONSTANTS, MODEL, SAMPLES, WEIGHTS, check_pt2
from rotquant_tvm.frontend.torch_program import program_step
from rotquant_tvm.frontend.torch_program_archive import load_program

from .fuzzing import JSON_PIECES, PLAIN, changed, forms, fuzz, mutated
from .model_files import program_records, zipped
from .reading import read

SHARES = st.integers(0, 9).map(lambda number: number == 0)
"""How many inputs are imported to the end, where the reader takes them."""

NUMBERS = st.sampled_from((0, 1, 2, 16, 24, 48, 2**20, 2**31, 2**40, 2**63 - 1, 2**63, -1, -(2**63), 10**30))
TARGETS = (
    *("torch.ops.aten.full.default", "torch.ops.aten.zeros.default", "torch.ops.aten.arange.default"),
    *("torch.ops.aten.mm.default", "torch.ops.aten.expand.default", "torch.ops.aten.repeat.default", "math.factorial"),
    *("torch.ops.aten.add_.Tensor", "torch.ops.aten.item.default", "torch.ops.aten._local_scalar_dense.default"),
    *("torch.ops.higher_order.cond", "torch.ops.higher_order.wrap_with_set_grad_enabled", "_operator.getitem"),
    *("torch.ops.aten.save.default", "os.system", "builtins.eval", "torch.load", "_operator.pow", "_operator.mul"),
    *("torch.sym_float", "torch.ops.aten.sym_size.int", "torch.ops.aten.resize_.default", "math.pow", "torch.sym_max"),
)
SIZES = (
    *("s0", "s77", "2*s77", "s77 + 1", "9999999999*s77", "-s77", "s77//0", "Mod(s77, 0)", "1/0", "Max(s77, 2)"),
    *("__import__('os').system('touch {ran}')", "Symbol('s77', integer=True)", "Pow(Symbol('s77'), Integer(4))"),
    *("Integer('9' * 9999)", "Where(1, 2, 3)", "", "(" * 90 + "s77" + ")" * 90, "s77 < 3", "Rational(1, 3)", "1e999"),
)


class _Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.open, (self.path, os.O_CREAT)


@pytest.fixture
def path(tmp_path):
    """A valid file; the first reading of a process takes up what the packages need."""
    path = tmp_path / "program.pt2"
    path.write_bytes(zipped(program_records()))
    assert import_model(path).weights
    return path


def read_file(path, content: bytes, whole: bool) -> None:
    """Read a file as imports do, some to the end; whatever it is, its bomb does not go off."""
    path.write_bytes(content)
    read(lambda: check_pt2(path))
    program = read(lambda: load_program(path))
    if program is not None:
        assert program.example_inputs is None
        if whole:
            read(lambda: program_step(program, "a program"))
            read(lambda: import_model(path))
    assert not (path.parent / "ran").exists()


@st.composite
def replaced(draw: st.DrawFn, document: object) -> object:
    """A document of which some numbers, operators and sizes are others that mean something."""
    document = json.loads(json.dumps(document))
    places = list(_places(document))
    for _ in range(draw(st.integers(1, 3))):
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        value = holder[key]
        if key == "target":
            holder[key] = draw(st.sampled_from(TARGETS))
        elif key == "expr_str":
            holder[key] = draw(st.sampled_from(SIZES))
        elif isinstance(value, bool):
            holder[key] = not value
        elif isinstance(value, int):
            holder[key] = draw(NUMBERS | st.integers(0, 20))
        elif isinstance(value, str):
            other, name = places[draw(st.integers(0, len(places) - 1))]
            holder[key] = other[name] if isinstance(other[name], str) else draw(st.text(max_size=6))
    return document


def _places(value):
    """Where numbers and texts stand, as a container with a key."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(part, dict | list):
            yield from _places(part)
        elif key not in ("stack_trace", "nn_module_stack", "torch_fn"):
            yield value, key


def bombed(document: object, path) -> bytes:
    """A record as JSON; what would run makes the file that must not be."""
    return json.dumps(document).replace("{ran}", str(path.parent / "ran")).encode()


@pytest.mark.parametrize("record", [MODEL, CONFIGS[WEIGHTS], CONFIGS[CONSTANTS]])
@forms(25, 1_500)
def test_records_of_any_json(examples, path, record):
    records = program_records()
    document = json.loads(records[record])
    named = next(iter(json.loads(records[CONFIGS[WEIGHTS]])["config"].values()))
    if record == CONFIGS[CONSTANTS]:  # empty in the valid file
        document = {"config": {"scale": {**named, "path_name": "tensor_0", "is_param": False}}}
    bomb = pickle.dumps(_Bomb(path.parent / "ran"))
    extra = {CONSTANTS + "tensor_0": records[WEIGHTS + "weight_0"], SAMPLES: bomb, CONSTANTS + "opaque_obj_0": bomb}

    def check(case):
        content, whole = case
        read_file(path, zipped({**records, **extra, record: bombed(content, path)}), whole)

    documents = replaced(document) | changed(document) | replaced(document).flatmap(changed) | PLAIN
    fuzz(f"programs ({record.rpartition('/')[2]} as JSON)", st.tuples(documents, SHARES), check, examples)


@forms(25, 1_500)
def test_records_of_any_bytes(examples, path):
    """Records changed, gone, exchanged or pickles, with the checksums of an archive that is whole."""
    records = program_records()
    bomb = pickle.dumps(_Bomb(path.parent / "ran"))
    names = [name for name in records if not name.startswith(".")]

    def others(name: str) -> st.SearchStrategy[dict[str, bytes | None]]:
        pieces = (*JSON_PIECES, bomb)
        content = mutated(st.just(records[name]), pieces) | st.sampled_from((None, b"", bomb, *records.values()))
        return content.map(lambda value: {name: value})

    extra = st.sampled_from((*("models/../x", "data/aotinductor/x.so", "a\0b", "", "x" * 60_000, "data.pkl"), *_OPAQUE))
    change = st.sampled_from(names).flatmap(others) | extra.map(lambda name: {name: bomb})

    def check(case):
        changes, whole = case
        chosen = {**records, **{name: value for part in changes for name, value in part.items()}}
        read_file(path, zipped({name: value for name, value in chosen.items() if value is not None}), whole)

    cases = st.tuples(st.lists(change, min_size=1, max_size=3), SHARES)
    fuzz("programs (records)", cases, check, examples)


_OPAQUE = (CONSTANTS + "opaque_obj_0", WEIGHTS + "weight_99", "extra/bomb", "constants.pkl")


@forms(25, 1_500)
def test_archives_of_any_bytes(examples, path):
    """The archive's own entries: offsets, sizes, counts, names and methods, at its end and before records."""
    valid = zipped(program_records())
    start = valid.index(b"PK\x01\x02")
    pieces = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"../", b"\0" * 8, b"\xff" * 8)
    pieces += tuple(struct.pack("<I", number) for number in (0, 1, len(valid), start, 2**31, 2**32 - 1))
    directory = mutated(st.just(valid[start:]), pieces).map(lambda tail: valid[:start] + tail)
    end = mutated(st.just(valid[-22:]), pieces).map(lambda tail: valid[:-22] + tail)
    cases = st.tuples(directory | end | mutated(st.just(valid), pieces), SHARES)
    fuzz("programs (archives)", cases, lambda case: read_file(path, *case), examples)
