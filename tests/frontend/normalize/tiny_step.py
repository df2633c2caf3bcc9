"""A small decoder step written out in Relax, in many spellings of cache, mask, positions and logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.step_graph import SOFTCAPS, StepGraph

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, ROWS = 23, 24, 4, 2, 32, 64
"""ROWS: positions of learned and tabulated embeddings."""
HIDDEN = -1e9


@dataclass
class Spelling:
    """What a step looks like; see ``TinyStep`` for the choices of each."""

    cache: str = "bhsd"
    mask: Callable[[TinyStep], relax.Expr] | None = None
    positions: str = "position_ids"
    logits: str = "plain"
    batch: int | None = None
    layers: int = 2
    dtype: str = "int64"
    window: int | None = None
    capacity: int = 12
    softcaps: list[float] | None = None
    extra: Callable[[TinyStep, relax.Expr], relax.Expr] | None = None
    order: list[int] | None = None
    hidden_output: bool = False
    config: dict[str, Any] = field(default_factory=dict)


class TinyStep:
    """Builds one function; ``graph()`` is the result.

    While it builds, mask functions use ``emit``, ``batch``, ``seq``, ``past``, ``total`` and ``inputs`` (by name).
    """

    def __init__(self, spelling: Spelling) -> None:
        self.spelling = s = spelling
        var = lambda name: tvm.tirx.Var(name, "int64")  # noqa: E731
        self.batch = var("b") if s.batch is None else s.batch
        self.seq, self.past = var("s"), var("p")
        self.cached, self.static = s.cache != "none", s.cache == "static"
        # Exporters name the length of the mask by itself: nothing says that it is past + seq.
        # (Only where it meets nothing else: TVM cannot tell the shape of what it is computed with.)
        named = "mask" in getattr(s.mask, "inputs", ()) and self.cached and not self.static
        self.total = var("t") if named else (
            self.past + self.seq if self.cached and not self.static else self.seq)  # fmt: skip
        self.length = s.capacity if self.static else self.past + self.seq if self.cached else self.seq
        self.rng = np.random.default_rng(3)
        self.builder = relax.BlockBuilder()
        self.emit = self.builder.emit
        self.inputs: dict[str, relax.Var] = {}
        self.weights: dict[str, tuple[relax.Var, np.ndarray]] = {}
        self._declare()

    def input(self, name: str, shape: list, dtype: str) -> None:
        self.inputs[name] = relax.Var(name, relax.TensorType(shape, dtype))

    def weight(self, name: str, *shape: int, scale: float = 0.35) -> relax.Var:
        value = self.rng.standard_normal(shape).astype("float32") * np.float32(scale)
        return self.given(name, value)

    def given(self, name: str, value: np.ndarray) -> relax.Var:
        self.weights[name] = (relax.Var(name.replace(".", "_"), relax.TensorType(value.shape, str(value.dtype))), value)
        return self.weights[name][0]

    def _declare(self) -> None:
        s, b, seq = self.spelling, self.batch, self.seq
        self.input("input_ids", [b, seq], s.dtype)
        if s.positions == "position_ids":
            self.input("position_ids", [b, seq], s.dtype)
        if s.positions == "cache_position" or self.static:
            self.input("cache_position", [seq], "int64")
        wants = getattr(s.mask, "inputs", ())
        if "attention_mask" in wants or s.positions == "cumsum":
            self.input("attention_mask", [b, self.total], "int64")
        if "mask" in wants:
            self.input("mask", [b, 1, seq, s.capacity if self.static else self.total], wants["mask"])
        if hasattr(s.mask, "extra_input"):
            name, shape, kind = s.mask.extra_input
            self.input(name, shape(self), kind)
        shapes = {
            "bhsd": [b, KV_HEADS, self.past, HEAD_DIM],
            "half": [b, KV_HEADS, self.past, HEAD_DIM],
            "bshd": [b, self.past, KV_HEADS, HEAD_DIM],
            "transposed": [b, KV_HEADS, self.past, HEAD_DIM],
            "merged": [b * KV_HEADS, self.past, HEAD_DIM],
            "packed": [2, b, KV_HEADS, self.past, HEAD_DIM],
            "static": [b, KV_HEADS, s.capacity, HEAD_DIM],
            "latent": [b, self.past, WIDTH],
        }
        dtype = "float16" if s.cache == "half" else "float32"
        for layer in range(s.layers if self.cached else 0):
            if s.cache == "packed":
                self.input(f"past_{layer}", shapes["packed"], dtype)
                continue
            shape = shapes.get(s.cache, shapes["bhsd"])
            key_shape = [b, KV_HEADS, HEAD_DIM, self.past] if s.cache == "transposed" else shape
            self.input(f"past_{layer}.key", key_shape, dtype)
            self.input(f"past_{layer}.value", shape, dtype)
        self.weight("embed", VOCAB, WIDTH, scale=1.0)
        self.weight("wpe", ROWS, WIDTH, scale=1.0)
        self.given("freq", (1.0 / 50.0 ** (np.arange(HEAD_DIM // 2) / 3)).astype("float32"))
        angles = np.outer(np.arange(ROWS), self.weights["freq"][1]).astype("float32")
        self.given("angles", np.concatenate([angles, angles], axis=1))
        for layer in range(s.layers):
            for name, out in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
                self.weight(f"{layer}.{name}", WIDTH, out * HEAD_DIM)
            self.weight(f"{layer}.o", HEADS * HEAD_DIM, WIDTH)
        self.weight("norm", WIDTH)
        self.weight("head", WIDTH, VOCAB)
        self.weight("unused", 3)

    def w(self, name: str) -> relax.Var:
        return self.weights[name][0]

    # -- positions --------------------------------------------------------------------------------------------------

    def token_positions(self) -> relax.Expr:
        """Positions as the spelling has them: [b, s], [1, s] or [s]."""
        kind, emit = self.spelling.positions, self.emit
        if kind in ("position_ids", "cache_position"):
            return self.inputs[kind]
        if kind == "cumsum":
            count = emit(R.cumsum(self.inputs["attention_mask"], axis=1, dtype="int64"))
            count = emit(R.subtract(count, relax.const(1, "int64")))
            count = emit(R.where(emit(R.equal(self.inputs["attention_mask"], relax.const(0, "int64"))),
                                 relax.const(1, "int64"), count))  # fmt: skip
            begin = self.past if self.cached else 0
            return emit(R.strided_slice(count, axes=[1], begin=[begin], end=[begin + self.seq]))
        start = self.past if self.cached else 0
        return emit(R.arange(start, start + self.seq, 1, "int64"))

    def angle_pair(self) -> list[relax.Expr]:
        """cos and sin of the tokens, with an axis of heads at 1 and the batch or nothing before it."""
        emit, kind = self.emit, self.spelling.positions
        if kind == "table_slice":
            start = self.past if self.cached else 0
            angles = emit(R.strided_slice(self.w("angles"), axes=[0], begin=[start], end=[start + self.seq]))
            angles = emit(R.reshape(angles, [1, 1, self.seq, HEAD_DIM]))
            return [emit(R.cos(angles)), emit(R.sin(angles))]
        positions = self.positions
        if kind == "table_prefix":
            table = emit(R.strided_slice(self.w("angles"), axes=[0], begin=[0], end=[self.length]))
            angles = emit(R.take(table, positions, axis=0))
        else:
            half = self.emit(R.multiply(emit(R.expand_dims(emit(R.astype(positions, "float32")), -1)), self.w("freq")))
            angles = emit(R.concat([half, half], axis=-1))
        if angles.ty.ndim == 3:
            angles = emit(R.expand_dims(angles, 1))
        return [emit(R.cos(angles)), emit(R.sin(angles))]

    def rotated(self, x: relax.Expr, cos: relax.Expr, sin: relax.Expr) -> relax.Expr:
        emit, half = self.emit, HEAD_DIM // 2
        first = emit(R.strided_slice(x, axes=[3], begin=[0], end=[half]))
        second = emit(R.strided_slice(x, axes=[3], begin=[half], end=[HEAD_DIM]))
        swapped = emit(R.concat([emit(R.negative(second)), first], axis=3))
        return emit(R.add(emit(R.multiply(x, cos)), emit(R.multiply(swapped, sin))))

    # -- caches -----------------------------------------------------------------------------------------------------

    def joined(self, layer: int, key: relax.Expr, value: relax.Expr) -> tuple[relax.Expr, relax.Expr, list]:
        """Keys and values [b, length, heads, d] for attention, and the presents, from new ones [b, h, s, d]."""
        emit, cache = self.emit, self.spelling.cache
        swap = lambda x: emit(R.permute_dims(x, [0, 2, 1, 3]))  # noqa: E731
        if cache == "none":
            return swap(key), swap(value), []
        if cache == "packed":
            whole = emit(R.concat([self.inputs[f"past_{layer}"], emit(R.stack([key, value], axis=0))], axis=3))
            parts = [emit(R.take(whole, relax.const(i, "int64"), axis=0)) for i in (0, 1)]
            return swap(parts[0]), swap(parts[1]), [whole]
        owner = 0 if cache == "shared" else layer
        pasts = [self.inputs[f"past_{owner}.{name}"] for name in ("key", "value")]
        if cache == "half":
            wholes = [emit(R.concat([past, emit(R.astype(new, "float16"))], axis=2))
                      for past, new in zip(pasts, (key, value), strict=True)]  # fmt: skip
            read = [swap(emit(R.astype(whole, "float32"))) for whole in wholes]
            return read[0], read[1], wholes
        if cache == "bshd":
            wholes = [emit(R.concat([past, swap(new)], axis=1)) for past, new in zip(pasts, (key, value), strict=True)]
            return wholes[0], wholes[1], wholes
        if cache == "merged":
            flat = [emit(R.reshape(new, [self.batch * KV_HEADS, self.seq, HEAD_DIM])) for new in (key, value)]
            wholes = [emit(R.concat([past, new], axis=1)) for past, new in zip(pasts, flat, strict=True)]
            shape = [self.batch, KV_HEADS, self.length, HEAD_DIM]
            return swap(emit(R.reshape(wholes[0], shape))), swap(emit(R.reshape(wholes[1], shape))), wholes
        if cache == "transposed":
            whole = emit(R.concat([pasts[0], emit(R.permute_dims(key, [0, 1, 3, 2]))], axis=3))
            values = emit(R.concat([pasts[1], value], axis=2))
            return emit(R.permute_dims(whole, [0, 3, 1, 2])), swap(values), [whole, values]
        if cache == "static":
            shape = [self.batch, KV_HEADS, self.seq, HEAD_DIM]
            index = emit(R.reshape(self.inputs["cache_position"], [1, 1, self.seq, 1]))
            index = emit(R.broadcast_to(index, shape))
            wholes = [emit(R.scatter_elements(past, index, new, axis=2))
                      for past, new in zip(pasts, (key, value), strict=True)]  # fmt: skip
            return swap(wholes[0]), swap(wholes[1]), wholes
        if cache == "rolling":
            kept = [emit(R.strided_slice(past, axes=[2], begin=[self.seq], end=[self.past])) for past in pasts]
            wholes = [emit(R.concat([past, new], axis=2)) for past, new in zip(kept, (key, value), strict=True)]
            return swap(wholes[0]), swap(wholes[1]), wholes
        if cache == "cross":
            return swap(pasts[0]), swap(pasts[1]), pasts
        if cache == "latent":
            flat = [emit(R.reshape(swap(new), [self.batch, self.seq, KV_HEADS * HEAD_DIM])) for new in (key, value)]
            wide = [emit(R.matmul(x, emit(R.permute_dims(self.w("0.k"))))) for x in flat]
            wholes = [emit(R.concat([past, new], axis=1)) for past, new in zip(pasts, wide, strict=True)]
            read = [emit(R.matmul(whole, self.w(f"{layer}.k"))) for whole in wholes]
            shape = [self.batch, self.length, KV_HEADS, HEAD_DIM]
            return emit(R.reshape(read[0], shape)), emit(R.reshape(read[1], shape)), wholes
        if cache == "shared" and layer:
            return (*self.first, [])
        wholes = [emit(R.concat([past, new], axis=2)) for past, new in zip(pasts, (key, value), strict=True)]
        if cache == "scaled":
            return swap(emit(R.multiply(wholes[0], relax.const(0.5, "float32")))), swap(wholes[1]), wholes
        if cache == "leaking":
            self.leak = wholes[0]
        if cache == "unreturned":
            return swap(wholes[0]), swap(wholes[1]), [wholes[0], value]
        if cache == "cut":
            kept = [emit(R.strided_slice(x, axes=[2], begin=[-40], end=[2**31 - 1])) for x in wholes]
            return swap(wholes[0]), swap(wholes[1]), kept
        if cache == "reversed":
            wholes = [emit(R.concat([new, past], axis=2)) for past, new in zip(pasts, (key, value), strict=True)]
        self.first = swap(wholes[0]), swap(wholes[1])
        return (*self.first, wholes)

    # -- the whole --------------------------------------------------------------------------------------------------

    def graph(self) -> StepGraph:
        s = self.spelling
        params = [*self.inputs.values(), *(var for var, _ in self.weights.values())]
        attrs = {SOFTCAPS: s.softcaps} if s.softcaps else None
        presents: list = []
        with self.builder.function("main", params, attrs=attrs):
            with self.builder.dataflow():
                logits, presents = self._body()
                fields = [logits, *presents]
                self.names = ["logits", *(f"present.{i}" for i in range(len(presents)))]
                if s.hidden_output:
                    fields, self.names = [self.hidden, *fields], ["hidden_state", *self.names]
                if s.order is not None:
                    fields, self.names = [fields[i] for i in s.order], [self.names[i] for i in s.order]
                result = self.builder.emit_output(relax.Tuple(fields))
            self.builder.emit_func_output(result)
        values = [value for _, value in self.weights.values()]
        return StepGraph(
            self.builder.get(), list(self.inputs), self.names, values, list(self.weights), "tiny.onnx", s.config
        )

    def _body(self) -> tuple[relax.Expr, list]:
        s, emit = self.spelling, self.emit
        x = emit(R.take(self.w("embed"), self.inputs["input_ids"], axis=0))
        self.positions = self.token_positions()
        if s.logits != "no learned":
            offset = emit(R.add(self.positions, relax.const(2, str(self.positions.ty.dtype))))
            x = emit(R.add(x, emit(R.take(self.w("wpe"), offset, axis=0))))
        cos, sin = self.angle_pair()
        mask = s.mask(self) if s.mask is not None else None
        presents = []
        for layer in range(s.layers):
            x = self._layer(layer, x, cos, sin, mask, presents)
        if s.extra is not None:
            x = s.extra(self, x)
        return self._logits(x), presents

    def _layer(self, layer: int, x, cos, sin, mask, presents: list) -> relax.Expr:
        emit, s = self.emit, self.spelling
        normed = emit(R.nn.rms_norm(x, self.w("norm"), axes=[-1], epsilon=1e-5))
        heads = []
        for name, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            out = emit(R.matmul(normed, self.w(f"{layer}.{name}")))
            out = emit(R.reshape(out, [self.batch, self.seq, count, HEAD_DIM]))
            heads.append(emit(R.permute_dims(out, [0, 2, 1, 3])))
        query, key = self.rotated(heads[0], cos, sin), self.rotated(heads[1], cos, sin)
        keys, values, grown = self.joined(layer, key, heads[2])
        presents += grown
        query = emit(R.permute_dims(query, [0, 2, 1, 3]))
        if mask is None:
            out = R.nn.attention(query, keys, values, scale=0.4, causal_mask="BottomRight", window_size=s.window)
        else:
            out = R.nn.attention(query, keys, values, mask, scale=0.4)
        out = emit(R.reshape(emit(out), [self.batch, self.seq, HEADS * HEAD_DIM]))
        return emit(R.add(x, emit(R.matmul(out, self.w(f"{layer}.o")))))

    def _logits(self, x: relax.Expr) -> relax.Expr:
        emit, kind = self.emit, self.spelling.logits
        x = emit(R.nn.rms_norm(x, self.w("norm"), axes=[-1], epsilon=1e-5))
        self.hidden = x
        if kind == "last":
            x = emit(R.strided_slice(x, axes=[1], begin=[self.seq - 1], end=[self.seq]))
        if kind == "merged":
            x = emit(R.reshape(x, [self.batch * self.seq, WIDTH]))
        logits = emit(R.matmul(x, self.w("head")))
        if kind == "merged":
            logits = emit(R.reshape(logits, [self.batch, self.seq, VOCAB]))
        if kind == "flat":
            logits = emit(R.reshape(logits, [self.batch, self.seq * VOCAB]))
        if kind == "capped":
            cap = relax.const(3.0, "float32")
            logits = emit(R.multiply(emit(R.tanh(emit(R.divide(logits, cap)))), cap))
        return logits


def tiny_graph(**spelling: Any) -> StepGraph:
    """The graph of a spelling."""
    return TinyStep(Spelling(**spelling)).graph()
