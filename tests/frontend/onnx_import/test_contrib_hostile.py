"""Damaged and hostile ONNX files: one of our errors or a model, never a crash, a hang or a giant allocation."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rotquant_tvm.errors import ModelError, RotQuantError
from rotquant_tvm.frontend.normalize import normalize_step
from rotquant_tvm.frontend.onnx_import import read_onnx

from .hostile_files import damage_bytes, damage_fields, good_model

SECONDS, MEGABYTES = 5.0, 512
"""What the import of a small model may take of a processor and of memory."""


def try_import(data: bytes) -> bool:
    """Import a file of these bytes; returns whether it was taken. Whatever it raises is ours."""
    largest, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.onnx"
        path.write_bytes(data)
        try:
            normalize_step(read_onnx(path))
            taken = True
        except RotQuantError as error:
            assert str(error) and "\n" not in str(error).strip() and len(str(error)) < 20_000
            taken = False
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest < MEGABYTES * 1024
    return taken


def test_the_undamaged_model_is_taken():
    assert try_import(good_model().SerializeToString())


def attribute(model: onnx.ModelProto, op_type: str, name: str, value: int) -> None:
    """Set an attribute of the first node of an operator."""
    node = next(node for node in model.graph.node if node.op_type == op_type)
    for each in node.attribute:
        if each.name == name:
            each.i = value
            return
    node.attribute.append(onnx.helper.make_attribute(name, value))


ABSURD = {
    "a mask of 2 GiB": lambda model: setattr(model.graph.input[1].type.tensor_type.shape.dim[1], "dim_value", 1 << 31),
    "a batch of 2^31": lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1 << 31),
    "a batch of 0": lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 0),
    "a batch of 2^20": lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1 << 20),
    "a batch that is a difference": lambda model: setattr(
        model.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "seq - 1"
    ),
    "2^31 rows": lambda model: attribute(model, "MatMulNBits", "N", 1 << 31),
    "2^62 columns": lambda model: attribute(model, "MatMulNBits", "K", 1 << 62),
    "blocks of 2^40": lambda model: attribute(model, "MatMulNBits", "block_size", 1 << 40),
    "no heads": lambda model: attribute(model, "GroupQueryAttention", "num_heads", 0),
    "2^31 heads": lambda model: attribute(model, "GroupQueryAttention", "num_heads", 1 << 31),
}


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_sizes_are_refused(what):
    model = onnx.ModelProto()
    model.CopyFrom(good_model())
    ABSURD[what](model)
    assert not try_import(model.SerializeToString())


NAMES = {
    "a node": b"GroupQueryAttention_",
    "an input": b"input_ids",
    "a size": b"total",
    "an attribute": b"do_rotary",
}


@pytest.mark.parametrize("what", NAMES)
def test_a_name_that_is_no_text_is_refused(what, tmp_path):
    data = good_model().SerializeToString()
    path = tmp_path / "damaged.onnx"
    path.write_bytes(data.replace(NAMES[what], NAMES[what][:-1] + b"\xed"))
    with pytest.raises(ModelError, match="is not UTF-8; the file is damaged"):
        read_onnx(path)


ORDINARY = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(ORDINARY, max_examples=int(os.environ.get("ROTQUANT_FUZZ_EXAMPLES", "3000")))


def damaged(seed: int) -> bytes:
    """The good model damaged in its bytes or in its fields."""
    random = Random(seed)
    if seed % 3 == 0:
        return damage_bytes(good_model().SerializeToString(), random)
    return damage_fields(good_model(), random).SerializeToString()


@given(seed=st.integers(0, 2**32))
@ORDINARY
def test_damaged_files(seed):
    try_import(damaged(seed))


@pytest.mark.full
@given(seed=st.integers(0, 2**32))
@LONG
def test_many_damaged_files(seed):
    try_import(damaged(seed))
