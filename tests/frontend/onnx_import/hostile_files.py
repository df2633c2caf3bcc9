"""A small good ONNX decoder, and ways of damaging its bytes and its fields."""

from __future__ import annotations

from functools import cache
from random import Random

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper

from .onnx_cases import Graph, normal

HIDDEN, DIM, VOCAB = 32, 16, 11


@cache
def good_model() -> onnx.ModelProto:
    """A decoder of one layer with operators of every kind: quantized weights, attentions, norms, an If, arithmetic."""
    graph, rng = Graph(), np.random.default_rng(0)
    graph.input("input_ids", np.zeros((1, 1), np.int64), ["batch", "seq"])
    graph.input("attention_mask", np.zeros((1, 1), np.int64), ["batch", "total"])
    pasts = [
        graph.input(f"past_key_values.0.{kind}", np.zeros((1, 2, 1, DIM), np.float32), ["batch", 1, "past", DIM])
        for kind in ("key", "value")
    ]
    one, axes = graph.weight("one", np.array(1)), graph.weight("axes", np.array([1]))
    sums = graph.node("ReduceSum", ["attention_mask", axes], keepdims=0)
    seqlens = graph.node("Cast", [graph.node("Sub", [sums, one])], to=TensorProto.INT32)
    length = graph.node("Gather", [graph.node("Shape", ["attention_mask"]), one], axis=0)
    total = graph.node("Cast", [length], to=TensorProto.INT32)
    x = graph.node("Gather", [graph.weight("embed", normal(rng, VOCAB, HIDDEN)), "input_ids"])
    norm = graph.weight("norm", normal(rng, HIDDEN))
    normed = graph.node("SimplifiedLayerNormalization", [x, norm], axis=-1, epsilon=1e-5)
    widths = {"q": HIDDEN, "k": DIM, "v": DIM}
    operands = [_quantized(graph, rng, name, normed, width) for name, width in widths.items()]
    tables = [graph.weight(name, normal(rng, 64, DIM // 2)) for name in ("cos", "sin")]
    operands = [*operands, *pasts, seqlens, total, *tables]
    outputs = ["attended", "present.0.key", "present.0.value"]
    graph.contrib("GroupQueryAttention", operands, outputs, num_heads=2, kv_num_heads=1, do_rotary=1)
    skip = graph.contrib("SkipSimplifiedLayerNormalization", ["attended", x, norm], ["skip", "", "", "sum"])
    shape = graph.weight("shape", np.array([0, 0, 2, DIM]))
    heads = graph.node("Transpose", [graph.node("Reshape", [skip[0], shape])], perm=[0, 2, 1, 3])
    back = graph.node("Transpose", [heads], perm=[0, 2, 1, 3])
    flat = graph.node("Reshape", [back, graph.weight("flat", np.array([0, 0, HIDDEN]))])
    bias = graph.weight("gelu_bias", normal(rng, HIDDEN))
    active = graph.contrib("FastGelu", [_chosen(graph, flat), bias])
    out = graph.weight("out", normal(rng, VOCAB, HIDDEN))
    projected = graph.contrib("FusedMatMul", [active, out], transB=1, alpha=0.5)
    graph.node("Identity", [projected], ["logits"])
    for name, axes in [
        ("logits", ["batch", "seq", VOCAB]),
        *((name, ["batch", 1, "total", DIM]) for name in outputs[1:]),
    ]:
        graph.output(name, np.float32, axes)
    return graph.model()


def _quantized(graph: Graph, rng: np.random.Generator, name: str, x: str, width: int) -> str:
    codes = graph.weight(f"{name}.codes", rng.integers(0, 256, (width, 2, 8)).astype(np.uint8))
    scales = graph.weight(f"{name}.scales", rng.uniform(0, 0.1, (width, 2)).astype(np.float32))
    return graph.contrib("MatMulNBits", [x, codes, scales], N=width, K=HIDDEN, bits=4, block_size=16)


def _chosen(graph: Graph, x: str) -> str:
    """A value through an If on a constant."""
    branches = []
    for name, op_type in (("then", "Identity"), ("else", "Neg")):
        node = helper.make_node(op_type, [x], [f"{name}.out"], name=name)
        branches.append(helper.make_graph([node], name, [], [helper.make_tensor_value_info(f"{name}.out", 1, None)]))
    condition = graph.weight("condition", np.array(True))
    return graph.node("If", [condition], then_branch=branches[0], else_branch=branches[1])


NUMBERS = [0, 1, -1, 2, 3, 5, 7, 16, 255, 1 << 20, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 62, -(1 << 63), (1 << 63) - 1]
FLOATS = [0.0, -1.0, float("nan"), float("inf"), 1e38, 1e-45]
NAMES = ["", "x", "logits", "past_key_values.0.key", "input_ids", "attended", "batch * 0", "seq - 1", "1/0", "é\n"]
NAMES += ["a" * 300]
OPERATORS = """Attention MultiHeadAttention GroupQueryAttention RotaryEmbedding MatMulNBits GatherBlockQuantized
QuickGelu SkipLayerNormalization LayerNormalization Softmax If Loop Concat Reshape Slice Expand Cast Gather Where Split
Range Tile ConstantOfShape ScatterND TensorScatter""".split()


def damage_bytes(data: bytes, random: Random) -> bytes:
    """Change, drop, repeat or cut some bytes."""
    damaged = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 5, 20])):
        if not damaged:
            break
        place, kind = random.randrange(len(damaged)), random.randrange(5)
        if kind == 0:
            damaged[place] = random.randrange(256)
        elif kind == 1:
            damaged[place] ^= 1 << random.randrange(8)
        elif kind == 2:
            del damaged[place : place + random.choice([1, 2, 8, 100])]
        elif kind == 3:
            damaged[place:place] = damaged[place : place + random.choice([1, 4, 50])]
        elif random.random() < 0.3:
            del damaged[place:]
    return bytes(damaged)


def damage_fields(model: onnx.ModelProto, random: Random) -> onnx.ModelProto:
    """Change some fields of a copy of a model."""
    damaged = onnx.ModelProto()
    damaged.CopyFrom(model)
    for _ in range(random.choice([1, 1, 2, 3])):
        random.choice(DAMAGES)(damaged, random)
    return damaged


def _node(model: onnx.ModelProto, random: Random) -> onnx.NodeProto:
    return random.choice(model.graph.node) if model.graph.node else onnx.NodeProto()


def _attribute(model: onnx.ModelProto, random: Random) -> None:
    """An attribute with another value, of another type, or under another name."""
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    if not attributes:
        return
    attribute, kind = random.choice(attributes), random.randrange(5)
    if kind == 0:
        attribute.i = random.choice(NUMBERS)
    elif kind == 1:
        attribute.f = random.choice(FLOATS)
    elif kind == 2:
        attribute.type = random.choice([*range(12), 13, 14])
    elif kind == 3:
        attribute.name = random.choice([*[each.name for each in attributes], "then_branch", "axes", "value"])
    else:
        attribute.ints.extend(random.choice(NUMBERS) for _ in range(random.randrange(4)))


def _new_attribute(model: onnx.ModelProto, random: Random) -> None:
    names = "axis scale softcap local_window_size num_heads block_size bits perm to epsilon".split()
    value = random.choice([random.choice(NUMBERS), random.choice(FLOATS), "text", [1, 2], [random.choice(NUMBERS)]])
    _node(model, random).attribute.append(helper.make_attribute(random.choice(names), value))


def _inputs(model: onnx.ModelProto, random: Random) -> None:
    """A node with another, one more or one less input."""
    node = _node(model, random)
    names = [name for each in model.graph.node for name in (*each.input, *each.output)]
    names += [tensor.name for tensor in model.graph.initializer] + NAMES
    kind = random.randrange(3)
    if kind == 0 and node.input:
        node.input[random.randrange(len(node.input))] = random.choice(names)
    elif kind == 1 and node.input:
        del node.input[random.randrange(len(node.input))]
    else:
        node.input.extend([random.choice(names) for _ in range(random.randrange(1, 4))])


def _outputs(model: onnx.ModelProto, random: Random) -> None:
    node = _node(model, random)
    if random.random() < 0.5 and node.output:
        node.output[random.randrange(len(node.output))] = random.choice(NAMES)
    else:
        node.output.append(f"more{random.randrange(3)}")


def _operator(model: onnx.ModelProto, random: Random) -> None:
    node = _node(model, random)
    if random.random() < 0.7:
        node.op_type = random.choice(OPERATORS)
    if random.random() < 0.5:
        node.domain = random.choice(["", "com.microsoft", "ai.onnx", "other"])


def _nodes(model: onnx.ModelProto, random: Random) -> None:
    """A node twice, not at all, or elsewhere."""
    if not model.graph.node:
        return
    index = random.randrange(len(model.graph.node))
    copy = onnx.NodeProto()
    copy.CopyFrom(model.graph.node[index])
    if random.random() < 0.7:
        del model.graph.node[index]
    if random.random() < 0.5:
        model.graph.node.append(copy)


def _tensor(model: onnx.ModelProto, random: Random) -> None:
    """A weight of another shape or type, or with other numbers."""
    if not model.graph.initializer:
        return
    tensor, kind = random.choice(model.graph.initializer), random.randrange(4)
    if kind == 0 and tensor.dims:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(NUMBERS)
    elif kind == 1:
        tensor.data_type = random.choice([*range(26), 1000])
    elif kind == 2 and tensor.raw_data:
        tensor.raw_data = damage_bytes(tensor.raw_data, random)
    elif tensor.data_type == TensorProto.INT64:
        size = len(tensor.raw_data) // 8
        tensor.raw_data = np.array([random.choice(NUMBERS) for _ in range(size)], np.int64).tobytes()
    else:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=random.choice(["../x", "/etc/passwd", "no such file", "."]))


def _value(model: onnx.ModelProto, random: Random) -> None:
    """An input or output of another type, shape or name."""
    values = [*model.graph.input, *model.graph.output]
    if not values:
        return
    value, kind = random.choice(values), random.randrange(4)
    dims = value.type.tensor_type.shape.dim
    if kind == 0 and dims:
        random.choice(dims).dim_value = random.choice(NUMBERS)
    elif kind == 1 and dims:
        odd = ["past + seq", "batch", "(" * 80 + "a" + ")" * 80, "9**9**9"]
        random.choice(dims).dim_param = random.choice([*NAMES, *odd])
    elif kind == 2:
        value.type.tensor_type.elem_type = random.choice([*range(18), 99])
    else:
        value.name = random.choice(NAMES)


def _opset(model: onnx.ModelProto, random: Random) -> None:
    random.choice(model.opset_import).version = random.choice([0, 1, 7, 13, 18, 23, 24, 99, -1, 1 << 40])


def _branch(model: onnx.ModelProto, random: Random) -> None:
    """A branch that reads or returns something else."""
    graphs = [a.g for node in model.graph.node for a in node.attribute if a.type == AttributeProto.GRAPH]
    if graphs:
        graph = random.choice(graphs)
        if graph.node and random.random() < 0.5:
            random.choice(graph.node).input[:] = [random.choice(NAMES)]
        elif graph.output:
            graph.output[0].name = random.choice(NAMES)


DAMAGES = [_attribute, _attribute, _new_attribute, _inputs, _inputs, _outputs, _operator, _operator, _nodes, _tensor]
DAMAGES += [_tensor, _value, _value, _opset, _branch]
