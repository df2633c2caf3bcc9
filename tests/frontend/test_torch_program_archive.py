"""Saved programs: what is read from them, and what damaged and hostile ones give."""

from __future__ import annotations

import functools
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend import import_model
from rotquant_tvm.frontend.pt2_file import CONFIGS, CONSTANTS, MODEL, SAMPLES, WEIGHTS, check_pt2
from rotquant_tvm.frontend.torch_program import program_step
from rotquant_tvm.frontend.torch_program_archive import load_program

from ..sampling import sampled
from .program_runner import CanonicalRun
from .torch_program_cases import exported, torch_logits

WEIGHTS_CONFIG = CONFIGS[WEIGHTS]


class _Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("offset", torch.arange(4.0))

    def forward(self, x):
        return self.linear(x) + self.offset


@functools.cache
def _tiny_records() -> dict[str, bytes]:
    """The records of a small saved program with a dynamic size, without their folder."""
    program = torch.export.export(_Tiny(), (torch.zeros(3, 4),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    with zipfile.ZipFile(file) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def _write(path: Path, records: dict[str, bytes], **arguments) -> Path:
    with zipfile.ZipFile(path, "w", **arguments) as archive:
        for name, content in records.items():
            archive.writestr(f"program/{name}", content)
    return path


def _refuse(path: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message) as refusal:
        load_program(path)
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)


@pytest.mark.parametrize("name", sampled(["past", "buffers", "static", "cache"], ("buffers",)))
def test_a_saved_program_computes_what_it_did(name, tmp_path):
    path = tmp_path / "step.pt2"
    torch.export.save(exported(name), path)
    model, original = import_model(path), program_step(exported(name), "a program")
    assert model.tokenizer is None
    assert set(model.weight_names) == set(original.weight_names)
    ids = np.random.default_rng(1).integers(3, 97, (1 if name in ("buffers", "static") else 2, 12))
    expected = torch_logits(name, ids)
    run = CanonicalRun(model, len(ids))
    for start, stop in [(0, 7), (7, 11), (11, 12)]:
        np.testing.assert_allclose(run.step(ids[:, start:stop]), expected[:, stop - 1], atol=2e-5 * expected.max())


def test_a_plain_rewrite_of_the_records_loads(tmp_path):
    program = load_program(_write(tmp_path / "x.pt2", _tiny_records()))
    assert [node.name for node in program.graph.nodes][-1] == "output"
    torch.testing.assert_close(program.constants.get("offset", program.state_dict.get("offset")), torch.arange(4.0))


def test_devices_become_the_cpu(tmp_path):
    records = dict(_tiny_records())
    for name in (MODEL, *CONFIGS.values()):
        records[name] = records[name].replace(b'{"type": "cpu", "index": null}', b'{"type": "cuda", "index": 1}')
    assert records[WEIGHTS_CONFIG] != _tiny_records()[WEIGHTS_CONFIG]
    program = load_program(_write(tmp_path / "x.pt2", records))
    assert {tensor.device.type for tensor in program.state_dict.values()} == {"cpu"}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_file_that_was_cut_short_is_refused(share, tmp_path):
    whole = _write(tmp_path / "x.pt2", _tiny_records()).read_bytes()
    path = tmp_path / "cut.pt2"
    path.write_bytes(whole[: int(len(whole) * share)])
    _refuse(path, "damaged or cut short")


def test_a_changed_byte_is_found(tmp_path):
    path = _write(tmp_path / "x.pt2", _tiny_records())
    whole, weight = bytearray(path.read_bytes()), _tiny_records()["data/weights/weight_0"]
    whole[whole.index(weight) + 2] ^= 0x40
    path.write_bytes(whole)
    _refuse(path, "damaged: the checksum of 'program/data/weights/weight_0' is wrong")


class _Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def _changed(name: str, change) -> dict[str, bytes]:
    document = json.loads(_tiny_records()[name])
    change(document)
    return _tiny_records() | {name: json.dumps(document).encode()}


def _first(config: dict) -> dict:
    return next(iter(config["config"].values()))


def _pickled(bomb: bytes) -> dict[str, bytes]:
    def change(config):
        _first(config).update(use_pickle=True, tensor_meta=None)

    return _changed(WEIGHTS_CONFIG, change) | {"data/weights/weight_0": bomb}


def _opaque(bomb: bytes) -> dict[str, bytes]:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    return _changed(CONFIGS[CONSTANTS], lambda config: config["config"].update(x=entry)) | {
        CONSTANTS + "opaque_obj_0": bomb
    }


def _size(text: str) -> dict[str, bytes]:
    record = _tiny_records()[MODEL].decode()
    symbol = record.partition('"expr_str": "')[2].partition('"')[0]
    assert symbol
    changed = record.replace(f'"expr_str": "{symbol}"', f'"expr_str": {json.dumps(text)}')
    return _tiny_records() | {MODEL: changed.encode()}


def _operator(target: str) -> dict[str, bytes]:
    def change(document):
        document["graph_module"]["graph"]["nodes"][0]["target"] = target

    return _changed(MODEL, change)


def _inputs(spec) -> dict[str, bytes]:
    def change(document):
        document["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, spec])

    return _changed(MODEL, change)


def _sizes(*sizes, strides=None) -> dict[str, bytes]:
    def change(config):
        meta = _first(config)["tensor_meta"]
        meta["sizes"] = [{"as_int": size} for size in sizes]
        meta["strides"] = [{"as_int": stride} for stride in strides or [1] * len(sizes)]

    return _changed(WEIGHTS_CONFIG, change)


def _context(kind, context="null"):
    return {"type": kind, "context": context, "children_spec": []}


HOSTILE = {
    "pickled weights": (_pickled, "stored as a pickle, which may run code"),
    "pickled object": (_opaque, "stored as a pickle"),
    "call in a size": (lambda _: _size("__import__('os').mkdir('{ran}')"), "which is not arithmetic"),
    "attribute in a size": (lambda _: _size("s0.__class__"), "not arithmetic"),
    "keyword in a size": (lambda _: _size("Integer(x=1)"), "not arithmetic"),
    "huge power in a size": (lambda _: _size("9**9**9**9"), "not arithmetic"),
    "nested powers in a size": (lambda _: _size("Pow(Pow(Integer(9), Integer(4)), Integer(4))"), "not arithmetic"),
    "strange symbol": (lambda _: _size("Symbol('os.system')"), "not arithmetic"),
    "function below torch": (lambda _: _operator("torch.hub.load"), "'torch.hub.load', which is not one of PyTorch's"),
    "operator of a library": (lambda _: _operator("torch.ops.mylib.f.default"), "not one of PyTorch's own"),
    "python call": (lambda _: _operator("_operator.methodcaller"), "not one of PyTorch's own"),
    "file as tensor": (lambda _: _operator("torch.ops.aten.from_file"), "not one of PyTorch's own"),
    "unknown operator": (lambda _: _operator("torch.ops.aten.no_such_operator.default"), "cannot be loaded"),
    "container that imports": (
        lambda _: _inputs(_context("collections.defaultdict", '{"default_factory_module": "os"}')),
        "takes or returns a 'collections.defaultdict'",
    ),
    "enum that imports": (
        lambda _: _inputs(_context("builtins.dict", '[{"__enum__": true, "fqn": "os:x", "name": "y"}]')),
        "more than names and numbers",
    ),
    "damaged containers": (lambda _: _inputs([]), "damaged description of its inputs"),
    "tensor beyond its record": (lambda _: _sizes(10**15), "larger than the record"),
    "stride beyond its record": (lambda _: _sizes(2, 2, strides=[10**9, 1]), "larger than the record"),
    "a byte repeated": (lambda _: _sizes(1 << 40, 4, strides=[0, 1]), "more than .* elements"),
    "negative size": (lambda _: _sizes(-1, 4), "not a number of 0 or more"),
    "record elsewhere": (
        lambda _: _changed(WEIGHTS_CONFIG, lambda c: _first(c).update(path_name="weight_../../../etc/passwd")),
        "stored as a pickle|lacks",
    ),
    "missing record": (lambda _: _changed(WEIGHTS_CONFIG, lambda c: _first(c).update(path_name="weight_99")), "lacks"),
    "no tensors": (lambda _: _changed(WEIGHTS_CONFIG, lambda c: c.update(config=[1])), "does not describe tensors"),
    "no json": (lambda _: _tiny_records() | {MODEL: b"{"}, "is no JSON"),
    "deep json": (lambda _: _tiny_records() | {MODEL: b"[" * 200_000}, "is no JSON"),
    "deep document": (
        lambda _: _tiny_records() | {MODEL: b'{"a":' * 500 + b"1" + b"}" * 500},
        "nested more than 120 levels",
    ),
    "empty document": (lambda _: _tiny_records() | {MODEL: b"{}"}, "cannot be loaded"),
    "no graph": (lambda _: {k: v for k, v in _tiny_records().items() if k != MODEL}, "lacks models/model.json"),
    "machine code": (lambda _: _tiny_records() | {"data/aotinductor/model/x.so": b""}, "holds machine code"),
    "old file": (lambda _: {"serialized_exported_program.json": b"{}"}, "torch 2.7 or older"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_and_nothing_in_it_runs(name, tmp_path):
    make, message = HOSTILE[name]
    ran = tmp_path / "ran"
    records = {key: value.replace(b"{ran}", str(ran).encode()) for key, value in make(pickle.dumps(_Bomb(ran))).items()}
    _refuse(_write(tmp_path / "x.pt2", records), message)
    assert not ran.exists()


def test_example_inputs_are_not_unpickled(tmp_path):
    ran = tmp_path / "ran"
    path = _write(tmp_path / "x.pt2", _tiny_records() | {SAMPLES: pickle.dumps(_Bomb(ran))})
    assert load_program(path).example_inputs is None
    assert not ran.exists()


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    _refuse(_write(tmp_path / "a.pt2", _tiny_records(), compression=zipfile.ZIP_DEFLATED), "compressed or encrypted")
    path = _write(tmp_path / "b.pt2", _tiny_records())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(f"program/{MODEL}", b"{}")
    _refuse(path, "not all in one folder, each once")
    (tmp_path / "c.pt2").write_text("not a zip file")
    _refuse(tmp_path / "c.pt2", "damaged or cut short")
    with zipfile.ZipFile(tmp_path / "d.pt2", "w"):
        pass
    _refuse(tmp_path / "d.pt2", "not an archive that torch wrote")


def test_the_quick_check_reads_no_more_than_the_directory_and_checksums(tmp_path):
    names = check_pt2(_write(tmp_path / "x.pt2", _tiny_records()))
    assert {MODEL, SAMPLES, *CONFIGS.values()} <= names
