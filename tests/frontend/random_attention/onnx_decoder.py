"""A ``Drawn`` as an ONNX file, node by node: standard Attention, GroupQueryAttention, or products and a softmax."""

from __future__ import annotations

import numpy as np
import onnx

from ..onnx_import.onnx_cases import Graph
from .drawn_decoder import EPSILON, Drawn, Layer, rotary_tables

LOWEST = float(np.finfo(np.float32).min)


class OnnxDecoder:
    """Writes one graph; ``model()`` is the result."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn, self.graph, self.count = drawn, Graph(opset=23), 0
        self.node = self.graph.node
        self.past = drawn.cache != "none"
        self.values = drawn.weights()
        self.masks: dict[int | None, str] = {}

    def model(self) -> onnx.ModelProto:
        """The decoder."""
        drawn, graph = self.drawn, self.graph
        graph.input("input_ids", np.zeros((1, 1), np.int64), ["batch", "seq"])
        if self.needs_positions:
            graph.input("position_ids", np.zeros((1, 1), np.int64), ["batch", "seq"])
        if drawn.mask == "padding":
            graph.input("attention_mask", np.zeros((1, 1), np.int64), ["batch", "total" if self.past else "seq"])
        if drawn.mask.startswith("given"):
            dtype = bool if drawn.mask == "given-bool" else np.float32
            graph.input("mask", np.zeros((1, 1, 1, 1), dtype), ["batch", 1, "seq", "past + seq"])
        x = self.node("Gather", [self.weight("embed"), "input_ids"])
        if drawn.rotary == "none":
            x = self.node("Add", [x, self.node("Gather", [self.weight("places"), "position_ids"])])
        self.length = self.size("input_ids", 1)
        self.start = self.number([0])
        for index, layer in enumerate(drawn.layers):
            normed = self.norm(x, self.weight(f"{index}.norm"))
            out = self.attention(index, layer, normed)
            x = self.node("Add", [x, self.node("MatMul", [out, self.weight(f"{index}.o")])])
        self.node("MatMul", [self.norm(x, self.weight("norm")), self.weight("head")], ["logits"])
        graph.output("logits", np.float32, ["batch", "seq", self.values["head"].shape[1]])
        graph.outputs = graph.outputs[-1:] + graph.outputs[:-1]
        return graph.model()

    @property
    def needs_positions(self) -> bool:
        """GroupQueryAttention turns queries and keys by positions of its own."""
        return self.drawn.rotary == "none" or self.drawn.source != "onnx-gqa"

    def weight(self, name: str, value: np.ndarray | None = None) -> str:
        """An initializer, made once."""
        if not any(tensor.name == name for tensor in self.graph.initializers):
            self.graph.weight(name, self.values[name] if value is None else value)
        return name

    def number(self, value) -> str:
        """A constant."""
        self.count += 1
        dtype = np.float32 if isinstance(value, float) else np.int64
        return self.graph.weight(f"constant_{self.count}", np.array(value, dtype))

    def size(self, name: str, axis: int) -> str:
        """A size [1] of an input."""
        return self.node("Shape", [name], start=axis, end=axis + 1)

    def norm(self, x: str, weight: str) -> str:
        if self.drawn.packed:
            return self.node("RMSNormalization", [x, weight], axis=-1, epsilon=EPSILON)
        if self.drawn.biased:
            return self.node("SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=EPSILON, stash_type=1)
        mean = self.node("ReduceMean", [self.node("Mul", [x, x]), self.number([-1])], keepdims=1)
        root = self.node("Sqrt", [self.node("Add", [mean, self.number(EPSILON)])])
        return self.node("Mul", [self.node("Div", [x, root]), weight])

    def projected(self, index: int, x: str) -> list[str]:
        """Queries, keys and values [batch, seq, heads * head_dim]."""
        drawn = self.drawn
        if not drawn.packed:
            return [self.linear(x, f"{index}.{name}") for name in "qkv"]
        widths = [drawn.head_dim * heads for heads in (drawn.heads, drawn.kv_heads, drawn.kv_heads)]
        return self.node("Split", [self.side_by_side(index, x), self.number(widths)], 3, axis=-1)

    def side_by_side(self, index: int, x: str) -> str:
        """Queries, keys and values in one product."""
        for suffix in ("", "_bias") if self.drawn.biased else ("",):
            parts = [self.values[f"{index}.{name}{suffix}"] for name in "qkv"]
            self.values[f"{index}.qkv{suffix}"] = np.concatenate(parts, -1)
        return self.linear(x, f"{index}.qkv")

    def linear(self, x: str, name: str) -> str:
        y = self.node("MatMul", [x, self.weight(name)])
        return self.node("Add", [y, self.weight(f"{name}_bias")]) if self.drawn.biased else y

    def heads_first(self, x: str) -> str:
        split = self.node("Reshape", [x, self.number([0, 0, -1, self.drawn.head_dim])])
        return self.node("Transpose", [split], perm=[0, 2, 1, 3])

    def flat(self, x: str) -> str:
        return self.node("Reshape", [self.node("Transpose", [x], perm=[0, 2, 1, 3]), self.number([0, 0, -1])])

    def tables(self) -> list[str]:
        return [self.weight(n, t) for n, t in zip(("cos", "sin"), rotary_tables(self.drawn.head_dim), strict=True)]

    def turned(self, x: str) -> str:
        """Queries or keys [batch, heads, seq, head_dim] by their positions."""
        drawn = self.drawn
        if drawn.rotary == "none":
            return x
        pairs = int(drawn.rotary == "pairs")
        if drawn.scale_at == "both":
            return self.graph.contrib("RotaryEmbedding", [x, "position_ids", *self.tables()], interleaved=pairs)
        if drawn.scale_at == "query" or pairs:
            cos, sin = (self.node("Gather", [table, "position_ids"]) for table in self.tables())
            return self.node("RotaryEmbedding", [x, cos, sin], interleaved=pairs)
        cos, sin = (self.node("Unsqueeze", [self.node("Gather", [t, "position_ids"]), self.number([1])])
                    for t in self.tables())  # fmt: skip
        a, b = self.node("Split", [x], 2, axis=-1, num_outputs=2)
        first = self.node("Sub", [self.node("Mul", [a, cos]), self.node("Mul", [b, sin])])
        second = self.node("Add", [self.node("Mul", [b, cos]), self.node("Mul", [a, sin])])
        return self.node("Concat", [first, second], axis=-1)

    def pasts(self, index: int, shapes: tuple[list, list], presents: tuple[list, list]) -> tuple[list, list]:
        """The names of a layer's past inputs and present outputs."""
        names: tuple[list, list] = ([], [])
        for kind, shape, present in zip(("key", "value"), shapes, presents, strict=True):
            name = f"past_key_values.{index}.{kind}"
            names[0].append(self.graph.input(name, np.zeros((1,) * 4, np.float32), shape))
            names[1].append(f"present.{index}.{kind}")
            self.graph.output(names[1][-1], np.float32, present)
        return names

    def attention(self, index: int, layer: Layer, x: str) -> str:
        """[batch, seq, heads * head_dim]."""
        return {
            "onnx-gqa": self.grouped_query, "onnx-attention": self.standard, "onnx-spelled": self.spelled
        }[self.drawn.source](index, layer, x)  # fmt: skip

    def grouped_query(self, index: int, layer: Layer, x: str) -> str:
        drawn, graph = self.drawn, self.graph
        operands = [self.side_by_side(index, x), None, None] if drawn.packed else self.projected(index, x)
        length = "past" if drawn.cache == "past" else 160
        shape = ["batch", drawn.kv_heads, length, drawn.head_dim]
        present = ["batch", drawn.kv_heads, "total" if drawn.cache == "past" else 160, drawn.head_dim]
        pasts, presents = self.pasts(index, (shape, shape), (present, present))
        if index == 0:
            sums = self.node("ReduceSum", ["attention_mask", self.number([1])], keepdims=0)
            lengths = self.node("Cast", [self.node("Sub", [sums, self.number(1)])], to=onnx.TensorProto.INT32)
            total = self.node("Gather", [self.node("Shape", ["attention_mask"]), self.number(1)], axis=0)
            self.counts = [lengths, self.node("Cast", [total], to=onnx.TensorProto.INT32)]
        attributes = {"num_heads": drawn.heads, "kv_num_heads": drawn.kv_heads, "scale": layer.scale}
        attributes |= {"local_window_size": layer.window or -1, "softcap": layer.softcap or 0.0}
        tables = []
        if drawn.rotary != "none":
            attributes |= {"do_rotary": 1, "rotary_interleaved": int(drawn.rotary == "pairs")}
            tables = self.tables()
        outputs = [f"attended.{index}", *presents]
        graph.contrib("GroupQueryAttention", [*operands, *pasts, *self.counts, *tables], outputs, **attributes)
        return outputs[0]

    def standard(self, index: int, layer: Layer, x: str) -> str:
        """The operator of opset 23, on three axes or four."""
        drawn = self.drawn
        q, k, v = (self.heads_first(part) for part in self.projected(index, x))
        q, k = self.turned(q), self.turned(k)
        attributes = {"scale": layer.scale, "softcap": layer.softcap or 0.0}
        pasts, outputs = [], [f"attended.{index}"]
        if self.past:
            shape, present = (["batch", drawn.kv_heads, n, drawn.head_dim] for n in ("past", "past + seq"))
            pasts, presents = self.pasts(index, (shape, shape), (present, present))
            self.begin(index)
            outputs += presents
        three = drawn.scores in ("matmul", "bmm")
        if three:
            q, k, v = (self.flat(part) for part in (q, k, v))
            attributes |= {"q_num_heads": drawn.heads, "kv_num_heads": drawn.kv_heads}
        alone = drawn.mask == "positions" and layer.window is None
        mask = None if alone else self.mask(layer)
        self.node("Attention", [q, k, v, mask, *pasts], outputs, is_causal=int(alone), **attributes)
        return outputs[0] if three else self.flat(outputs[0])

    def begin(self, index: int, axis: int = 2) -> None:
        """Note the sizes of a step with a past."""
        if index == 0:
            self.start = self.size("past_key_values.0.value", axis)
            self.length = self.node("Add", [self.start, self.size("input_ids", 1)])

    def mask(self, layer: Layer) -> str:
        """Booleans, or numbers to add, that broadcast to [batch, heads, seq, length]."""
        if self.drawn.mask.startswith("given"):
            return "mask"
        if layer.window not in self.masks:
            zero, one = self.number(0), self.number(1)
            first, end = (self.node("Squeeze", [size]) for size in (self.start, self.length))
            rows = self.node("Unsqueeze", [self.node("Range", [first, end, one]), self.number([1])])
            columns = self.node("Unsqueeze", [self.node("Range", [zero, end, one]), self.number([0])])
            seen = self.node("LessOrEqual", [columns, rows])
            if layer.window:
                near = self.node("Greater", [columns, self.node("Sub", [rows, self.number(layer.window)])])
                seen = self.node("And", [seen, near])
            if self.drawn.mask == "padding":
                real = self.node("Cast", ["attention_mask"], to=onnx.TensorProto.BOOL)
                seen = self.node("And", [seen, self.node("Unsqueeze", [real, self.number([1, 2])])])
            if self.drawn.biased:
                seen = self.node("Where", [seen, self.number(0.0), self.number(LOWEST)])
            self.masks[layer.window] = seen
        return self.masks[layer.window]

    def spelled(self, index: int, layer: Layer, x: str) -> str:
        """Two products and a softmax."""
        drawn, node = self.drawn, self.node
        q, k, v = (self.heads_first(part) for part in self.projected(index, x))
        q, k = self.turned(q), self.turned(k)
        if self.past:
            k, v = self.joined(index, k, v)
        k, v = self.repeated(k), self.repeated(v)
        factor = layer.scale**0.5 if drawn.scale_at == "both" else layer.scale
        if drawn.scale_at != "scores":
            q = node("Mul", [q, self.number(factor)])
        if drawn.scale_at == "both":
            k = node("Mul", [k, self.number(factor)])
        if drawn.scores == "einsum":
            scores = node("Einsum", [q, k], equation="bhqd,bhkd->bhqk")
        else:
            scores = node("MatMul", [q, node("Transpose", [k], perm=[0, 1, 3, 2])])
        if drawn.scale_at == "scores":
            scores = node("Div", [scores, self.number(1 / layer.scale)])
        if layer.softcap:
            cap = self.number(layer.softcap)
            scores = node("Mul", [node("Tanh", [node("Div", [scores, cap])]), cap])
        mask = self.mask(layer)
        added = drawn.biased if drawn.mask in ("positions", "padding") else drawn.mask == "given"
        scores = node("Add", [scores, mask]) if added else node("Where", [mask, scores, self.number(LOWEST)])
        return self.flat(node("MatMul", [node("Softmax", [scores], axis=-1), v]))

    def joined(self, index: int, k: str, v: str) -> list[str]:
        """Keys and values [batch, kv_heads, length, head_dim] after those of the past."""
        drawn, node = self.drawn, self.node
        bshd, turned = drawn.cache == "past-bshd", drawn.cache == "past-transposed"

        def shape(length: str, keys: bool) -> list:
            if bshd:
                return ["batch", length, drawn.kv_heads, drawn.head_dim]
            sizes = [drawn.head_dim, length] if turned and keys else [length, drawn.head_dim]
            return ["batch", drawn.kv_heads, *sizes]

        shapes, grown = (tuple(shape(n, keys) for keys in (True, False)) for n in ("past", "past + seq"))
        pasts, presents = self.pasts(index, shapes, grown)
        self.begin(index, 1 if bshd else 2)
        if bshd:
            k, v = (node("Transpose", [part], perm=[0, 2, 1, 3]) for part in (k, v))
        if turned:
            k = node("Transpose", [k], perm=[0, 1, 3, 2])
        axes = [1, 1] if bshd else [3 if turned else 2, 2]
        for past, part, present, axis in zip(pasts, (k, v), presents, axes, strict=True):
            node("Concat", [past, part], [present], axis=axis)
        k, v = presents
        if bshd:
            return [node("Transpose", [part], perm=[0, 2, 1, 3]) for part in (k, v)]
        return [node("Transpose", [k], perm=[0, 1, 3, 2]) if turned else k, v]

    def repeated(self, x: str) -> str:
        """Keys or values for every query head."""
        drawn, node = self.drawn, self.node
        if drawn.group == 1:
            return x
        if drawn.repeat in ("take", "interleave"):
            order = np.repeat(np.arange(drawn.kv_heads), drawn.group).tolist()
            return node("Gather", [x, self.number(order)], axis=1)
        wide = node("Unsqueeze", [x, self.number([2])])
        if drawn.repeat == "expand":
            wide = node("Expand", [wide, self.number([1, 1, drawn.group, 1, 1])])
        else:
            wide = node("Tile", [wide, self.number([1, 1, drawn.group, 1, 1])])
        return node("Reshape", [wide, self.number([0, drawn.heads, -1, drawn.head_dim])])


def onnx_decoder(drawn: Drawn) -> onnx.ModelProto:
    """The ONNX model of a decoder."""
    return OnnxDecoder(drawn).model()
