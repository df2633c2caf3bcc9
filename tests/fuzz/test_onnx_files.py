"""ONNX files of any content: fields of the protobuf changed at any depth, graphs of any operators, any bytes."""

from __future__ import annotations

import onnx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper

from rotquant_tvm.frontend.normalize import normalize_step
from rotquant_tvm.frontend.onnx_import import onnx_data_files, read_onnx

from ..frontend.onnx_import.hostile_files import OPERATORS, good_model
from .fuzzing import forms, fuzz, mutated
from .reading import read

NUMBERS = st.sampled_from((0, 1, 2, 3, 7, 13, 16, 255, 2**20, 2**31 - 1, 2**40, 2**62, 2**63 - 1)) | st.integers(-2, 40)
SHARES = st.integers(0, 9).map(lambda number: number == 0)
"""How many inputs are imported to the end, where the reader takes them."""


def parts(message: Message) -> list[Message]:
    """A message and all those in it."""
    found = [message]
    for descriptor, value in message.ListFields():
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if descriptor.is_repeated else [value]:
                found += parts(inner)
    return found


def texts(model: onnx.ModelProto) -> list[str]:
    """Every name that a model uses, and names that mean something."""
    nodes = model.graph.node
    names = {name for node in nodes for name in (*node.input, *node.output, *(each.name for each in node.attribute))}
    names |= {tensor.name for tensor in model.graph.initializer} | {node.op_type for node in model.graph.node}
    return [*sorted(names), *OPERATORS, "com.microsoft", "ai.onnx", "", "x", "past + seq", "1/0", "9**9**9", "a" * 300]


def scalar(draw: st.DrawFn, descriptor: FieldDescriptor, names: list[str]) -> object:
    """A value of a field's type."""
    kind = descriptor.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if descriptor.type == FieldDescriptor.TYPE_BYTES:
            return draw(st.binary(max_size=40) | st.sampled_from((b"NOTSET", b"tanh", b"linear", b"\xff", bytes(256))))
        return draw(st.sampled_from(names) | st.text(st.characters(codec="utf-8"), max_size=6))
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return draw(st.sampled_from((0.0, -1.0, 1e38, 1e-45, float("nan"), float("inf"))) | st.floats(width=32))
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return draw(st.sampled_from([value.number for value in descriptor.enum_type.values]))
    number = draw(NUMBERS)
    small = kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32)
    number = number % 2**31 if small else number
    return abs(number) if kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64) else number


def change_message(draw: st.DrawFn, model: onnx.ModelProto, names: list[str]) -> None:
    """Change one field of one message: clear it, add to it, remove from it, repeat or replace a part."""
    by_type: dict[str, list[Message]] = {}
    for part in parts(model):
        by_type.setdefault(part.DESCRIPTOR.name, []).append(part)
    of_type = by_type[draw(st.sampled_from(sorted(by_type)))]
    message = of_type[draw(st.integers(0, len(of_type) - 1))]
    fields = list(message.DESCRIPTOR.fields)
    present = [descriptor for descriptor, _ in message.ListFields()]
    descriptor = draw(st.sampled_from(present if present and draw(st.integers(0, 2)) else fields))
    if draw(st.integers(0, 9)) == 0:
        message.ClearField(descriptor.name)
    elif descriptor.is_repeated:
        change_list(draw, message, descriptor, names, by_type)
    elif descriptor.type == FieldDescriptor.TYPE_MESSAGE:
        replace(draw, getattr(message, descriptor.name), by_type)
    else:
        setattr(message, descriptor.name, scalar(draw, descriptor, names))


def change_list(draw, message: Message, descriptor: FieldDescriptor, names: list[str], by_type) -> None:
    """Remove, repeat or replace an element of a list, or add one."""
    values = getattr(message, descriptor.name)
    at = draw(st.integers(0, len(values) - 1)) if values else None
    action = draw(st.sampled_from(("remove", "repeat", "replace", "add"))) if values else "add"
    if action == "remove":
        del values[at]
    elif descriptor.type == FieldDescriptor.TYPE_MESSAGE:
        if action == "repeat":
            values.add().CopyFrom(values[at])
        else:
            replace(draw, values[at] if action == "replace" else values.add(), by_type)
    elif action == "replace":
        values[at] = scalar(draw, descriptor, names)
    else:
        values.extend(
            [values[at] if action == "repeat" else scalar(draw, descriptor, names)] * draw(st.integers(1, 20))
        )


def replace(draw, message: Message, by_type: dict[str, list[Message]]) -> None:
    """Put another message of its type, or an empty one, in a message's place."""
    others = by_type.get(message.DESCRIPTOR.name, [])
    other = others[draw(st.integers(0, len(others) - 1))].SerializeToString() if others else b""
    message.ParseFromString(other)


@st.composite
def changed_models(draw: st.DrawFn) -> bytes:
    """The good model with some fields changed."""
    model = onnx.ModelProto()
    model.CopyFrom(good_model())
    names = texts(model)
    for _ in range(draw(st.integers(1, 4))):
        change_message(draw, model, names)
    return model.SerializePartialToString()


@st.composite
def models_of_few_nodes(draw: st.DrawFn) -> bytes:
    """Models of a few nodes of any operator that ONNX or the reader knows, with inputs and attributes of any kind."""
    known = [schema.name for schema in onnx.defs.get_all_schemas()]
    names = ["input_ids", "w", "n", "i"]
    nodes = []
    for index in range(draw(st.integers(1, 5))):
        operator = draw(st.sampled_from((*known, *OPERATORS)))
        inputs = draw(st.lists(st.sampled_from([*names, ""]), max_size=5))
        outputs = [f"v{index}.{n}" for n in range(draw(st.integers(1, 3)))]
        domain = draw(st.sampled_from(("", "", "", "com.microsoft")))
        node = helper.make_node(operator, inputs, outputs, name=f"node{index}", domain=domain)
        node.attribute.extend(draw(st.lists(attributes(operator), max_size=3)))
        nodes.append(node)
        names += outputs
    tensors = [
        helper.make_tensor("w", TensorProto.FLOAT, [4, 3], [float(n) for n in range(12)]),
        helper.make_tensor("n", TensorProto.INT64, [2], [draw(NUMBERS), draw(NUMBERS)]),
        helper.make_tensor("i", TensorProto.INT64, [], [draw(NUMBERS)]),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])
    out = helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "made", [ids], [out], initializer=tensors)
    opsets = [helper.make_opsetid("", draw(st.integers(7, 24))), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def attributes(operator: str) -> st.SearchStrategy[AttributeProto]:
    """An attribute that an operator has, or has not, of any value."""
    own = list(onnx.defs.get_schema(operator).attributes) if onnx.defs.has(operator) else []
    names = st.sampled_from([*own, "axis", "axes", "to", "num_heads", "bits", "perm", "value"])
    tensor = st.builds(lambda n: helper.make_tensor("t", TensorProto.INT64, [1], [n]), NUMBERS)
    values = NUMBERS | st.floats(width=32) | st.lists(NUMBERS, min_size=1, max_size=4) | st.text(max_size=3) | tensor
    return st.builds(helper.make_attribute, names, values)


@pytest.fixture
def path(tmp_path):
    """A valid file; the first reading of a process takes up what the packages need."""
    (tmp_path / "model.onnx").write_bytes(good_model().SerializeToString())
    normalize_step(read_onnx(tmp_path / "model.onnx"))
    (tmp_path / "data.bin").write_bytes(bytes(range(256)))
    return tmp_path / "model.onnx"


def read_file(path, content: bytes, whole: bool) -> None:
    """Read a file as imports do, some to the end."""
    path.write_bytes(content)
    read(lambda: onnx_data_files(path))
    graph = read(lambda: read_onnx(path))
    if graph is not None:
        assert len(graph.weights) == len(graph.weight_names)
        if whole:
            read(lambda: normalize_step(graph))


@forms(60, 10_000)
def test_files_of_other_fields(examples, path):
    cases = st.tuples(changed_models(), SHARES)
    fuzz("ONNX (fields)", cases, lambda case: read_file(path, *case), examples)


@forms(60, 10_000)
def test_files_of_few_nodes(examples, path):
    cases = st.tuples(models_of_few_nodes(), SHARES)
    fuzz("ONNX (made of any operators)", cases, lambda case: read_file(path, *case), examples)


@forms(40, 6_000)
def test_files_of_any_bytes(examples, path):
    cases = st.tuples(mutated(st.just(good_model().SerializeToString())), SHARES)
    fuzz("ONNX (bytes)", cases, lambda case: read_file(path, *case), examples)


@forms(40, 4_000)
def test_weights_in_any_file_beside_it(examples, path):
    """Tensors whose values are in other files: anywhere, of any size."""
    places = ("data.bin", "../data.bin", "/etc/passwd", "/dev/zero", "absent", "", ".", "model.onnx", "a\\b", "\0")
    numbers = NUMBERS.map(str) | st.sampled_from(("", "x", "1e3", " 4", "9" * 5000, "-0"))
    entry = st.one_of(
        st.tuples(st.just("location"), st.sampled_from(places)),
        st.tuples(st.sampled_from(("offset", "length", "checksum", "x")), numbers),
    )
    count = len(good_model().graph.initializer)

    def check(case):
        chosen, size, entries, whole = case
        model = onnx.ModelProto()
        model.CopyFrom(good_model())
        for at in chosen:
            tensor = model.graph.initializer[at]
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            if size is not None:
                tensor.dims[:] = [size]
            tensor.external_data.add(key="location", value="data.bin")
            for key, value in entries:
                tensor.external_data.add(key=key, value=value)
        read_file(path, model.SerializeToString(), whole)

    chosen = st.lists(st.integers(0, count - 1), min_size=1, max_size=3)
    cases = st.tuples(chosen, st.none() | NUMBERS, st.lists(entry, max_size=3), SHARES)
    fuzz("ONNX (external data)", cases, check, examples)
