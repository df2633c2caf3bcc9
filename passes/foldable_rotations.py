"""Which rotations of a function over a packed cache can move into the weights before or after them, and why others not.

Four tensors of every layer are rotated: new keys, new values and queries as they come from a linear layer, and
attention's output on its way to one. A rotation moves into the linear layer if all between is linear in the heads and
maps rotated heads to rotated heads, and nothing else reads what changes. Where a rotary embedding lies between, that
holds for a rotation in the planes of the embedding's own pairs alone: rotations in one plane commute, and those of
different planes do not meet. So planar pairs (2i, 2i + 1) pass an interleaved embedding; half-split pairs (i, i + d/2)
are no family's, and all families that mix more than two dimensions stop at either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from rotquant_tvm.formats import Rotation
from rotquant_tvm.ops.rotate import RotationShape

from .feature_probe import FeatureProbe
from .folded_weights import WeightRotation
from .head_sources import HEADS_AXIS, HeadSource, bias_of, escaping
from .kv_kernels import kernel_of, site_shape
from .weight_recipes import num_input

ROLES = ("q", "k", "v", "out")
NORMS = ("rsqrt", "sqrt", "mean", "nn.rms_norm", "nn.layer_norm", "nn.group_norm")
NO_ROTATION = "no rotation"
_ATTENTIONS = ("attention_dense", "attention_prefill", "attention_decode")


@dataclass(frozen=True)
class Applied:
    """Where a function applies a rotation: ``rotation`` of ``tensor``, by the calls bound to ``calls``."""

    tensor: relax.Var
    rotation: Rotation
    calls: tuple[relax.Var, ...]


@dataclass(frozen=True)
class Fold:
    """What folding one rotation takes: the weights that change, or the ``reason`` why it cannot be."""

    weights: tuple[WeightRotation, ...] = ()
    reason: str = ""


class FoldableRotations:
    """The rotations of one function.

    ``layers``: per layer, where they are applied, by role; a role without one is absent.
    """

    def __init__(self, mod: tvm.IRModule, func: relax.Function) -> None:
        self.mod, self.func = mod, func
        self.probe = FeatureProbe(func)
        self.weights = {weight: i for i, weight in enumerate(func.params[num_input(func) :])}
        self.layers = self._applied()

    def _kernel(self, var: relax.Expr) -> tuple[str, tvm.tirx.PrimFunc] | None:
        value = self.probe.value(var)
        return kernel_of(self.mod, value) if value is not None else None

    def _operands(self, var: relax.Var) -> dict[str, relax.Expr]:
        """The operands of a kernel's call by the names of its parameters."""
        call = self.probe.value(var)
        func = self.mod[call.args[0]]
        names = [param.name for param in func.params]
        return dict(zip(names, call.args[1].fields, strict=False))

    def _applied(self) -> list[dict[str, Applied]]:
        """Per layer, the rotations that are applied; layers are in the order of their calls, as sites are."""
        kernels = [(var, kernel) for var in self.probe.graph.nodes if (kernel := self._kernel(var)) is not None]
        entering = [var for var, (name, _) in kernels if name in ("append", "flush")]
        attending = [var for var, (name, _) in kernels if name in _ATTENTIONS]
        return [dict(self._of_layer(enter, attend)) for enter, attend in zip(entering, attending, strict=True)]

    def _of_layer(self, enter: relax.Var, attend: relax.Var) -> Iterator[tuple[str, Applied]]:
        operands = self._operands(enter)
        for number, role in enumerate("kv"):
            rotated = self._rotated(operands[role])
            constant = operands.get(f"rotation_{role}")
            if rotated is not None and constant is None:
                yield role, rotated
            elif constant is not None:
                shape = site_shape(self._kernel(enter)[1])
                codec = shape.codecs()[number]
                if codec.sketch is None and codec.rotation.structure:
                    data = constant.value.numpy()
                    rotation = Rotation.from_data(shape.head_dim, codec.rotation.structure, data)
                    yield role, Applied(operands[role], rotation, (enter,))
        query = self._rotated(self.probe.value(attend).args[1].fields[0])
        if query is not None:
            yield "q", query
        for reader in self.probe.readers(attend):
            back = self._rotated(reader)
            if back is not None:
                yield "out", Applied(reader, back.rotation.inverse(), (reader,))

    def _rotated(self, var: relax.Expr) -> Applied | None:
        """What a rotate kernel's call rotates, and by what."""
        kernel = self._kernel(var)
        if kernel is None or kernel[0] != "rotate":
            return None
        tensor, coefficients = self.probe.value(var).args[1].fields
        shape = RotationShape.of(kernel[1])
        rotation = Rotation.from_data(shape.head_dim, shape.structure, coefficients.value.numpy())
        return Applied(tensor, rotation, (var,))

    def fold(self, layer: int, role: str) -> Fold:
        """What becomes of a layer's rotation."""
        applied = self.layers[layer].get(role)
        if applied is None:
            return Fold(reason=NO_ROTATION)
        matrix = applied.rotation.matrix()
        if not np.allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-5):
            return Fold(reason="its map is no rotation")
        return self._forward(applied) if role == "out" else self._backward(role, applied)

    # Queries, keys and values: back to the linear layer that makes them.

    def _backward(self, role: str, applied: Applied) -> Fold:
        if not isinstance(applied.tensor, relax.Var):
            return Fold(reason="it is a constant")
        if other := self._another_reader(role, applied):
            return Fold(reason=other)
        source = HeadSource.of(self.probe, applied.tensor, HEADS_AXIS[role])
        if source is None:
            return Fold(reason="it does not come from one tensor")
        operator = self.probe.operator(source.source)
        if any(name in NORMS for name in (operator, *source.nonlinear)):
            return Fold(reason="QK-norm" if role in "qk" else "a norm lies between")
        if source.nonlinear:
            return Fold(reason=f"{source.nonlinear[0]} lies between")
        product = self._product(source.source)
        if product is None:
            return Fold(reason=f"it comes from {operator or 'an input'}, not from a linear layer")
        if not source.equivariant(applied.rotation.matrix()):
            return Fold(reason="RoPE" if source.rotary.dims else "its heads are not what the linear layer makes")
        if not source.in_order:
            return Fold(reason="the columns of its heads are not in order")
        if escaping(source, applied.tensor) is not None:
            return Fold(reason="what the linear layer makes has another reader")
        return self._with_weight(applied.rotation, product, source)

    def _with_weight(self, rotation: Rotation, product: relax.Var, source: HeadSource) -> Fold:
        found = self._weight(product)
        if isinstance(found, str):
            return Fold(reason=found)
        weight, flipped = found
        records = [WeightRotation.by(rotation, self.weights[weight], 0 if flipped else 1, source.starts)]
        bias = bias_of(self.probe, source.source, product)
        if bias is not None:
            if bias not in self.weights or len(self.probe.readers(bias)) != 1:
                return Fold(reason="its bias has another reader")
            records.append(WeightRotation.by(rotation, self.weights[bias], 0, source.starts))
        return Fold(tuple(records))

    def _another_reader(self, role: str, applied: Applied) -> str:
        """What reads a tensor unrotated; empty if nothing does."""
        matrix = applied.rotation.matrix()
        for reader in self.probe.readers(applied.tensor):
            again = self._rotated(reader)
            if again is not None and np.allclose(again.rotation.matrix(), matrix, atol=1e-6):
                continue
            kernel = self._kernel(reader)
            if kernel is not None and kernel[0] == "append" and reader in applied.calls:
                others = [name for name, x in self._operands(reader).items() if applied.tensor.same_as(x)]
                if others == [role]:
                    continue
                return "K and V are one tensor"
            return "it has another reader"
        return ""

    def _product(self, source: relax.Var) -> relax.Var | None:
        """The matrix product that a source is, with or without a bias."""
        if self.probe.operator(source) == "matmul":
            return source
        value = self.probe.value(source)
        operands = value.args if self.probe.operator(source) == "add" else ()
        products = [x for x in operands if self.probe.operator(x) == "matmul"]
        return products[0] if len(products) == 1 else None

    def _weight(self, product: relax.Var) -> tuple[relax.Var, bool] | str:
        """(weight, whether it is stored [out, in]) of a product, if nothing else reads it; else what is wrong."""
        var, flipped = self.probe.value(product).args[1], False
        while self.probe.operator(var) in ("permute_dims", "astype"):
            if len(self.probe.readers(var)) != 1:
                return "its weight has another reader"
            flipped ^= self.probe.operator(var) == "permute_dims"
            var = self.probe.value(var).args[0]
        if var not in self.weights or var.ty.ndim != 2:
            return "its weight is computed from others (packed or quantized)"
        if str(var.ty.dtype) != "float32":  # one of 16 bits would be rounded a second time, which shows in the logits
            return f"its weight is {var.ty.dtype}"
        if len(self.probe.readers(var)) != 1:
            return "its weight has another reader"
        return var, flipped

    def _only_waits(self, reader: relax.Var, var: relax.Var) -> bool:
        """Whether a kernel takes a tensor so as to come after it, and does not read it."""
        kernel = self._kernel(reader)
        if kernel is None or kernel[0] not in ("append", "flush"):
            return False
        return [name for name, x in self._operands(reader).items() if var.same_as(x)] == ["seen"]

    # Attention's output: on to the linear layer that reads it.

    def _forward(self, applied: Applied) -> Fold:
        shape = self.probe.shape(applied.tensor)
        heads, head_dim = shape[2:]
        held: Any = np.broadcast_to(np.arange(heads * head_dim).reshape(heads, head_dim), shape)
        var = applied.tensor
        while True:
            readers = [reader for reader in self.probe.readers(var) if not self._only_waits(reader, var)]
            if len(readers) != 1 or var.same_as(self.func.body.body):
                return Fold(reason="it has another reader")
            reader = readers[0]
            if self.probe.operator(reader) == "matmul":
                break
            if not self.probe.only_moves(reader):
                return Fold(reason=_between(self.probe.operator(reader)))
            var, held = reader, self.probe.evaluate(reader, {var: held})
        call = self.probe.value(reader)
        if not call.args[0].same_as(var) or call.args[1].same_as(var):
            return Fold(reason="it is multiplied from the left")
        columns = held.reshape(-1, held.shape[-1])
        place = np.argsort(columns[0])
        starts = place.reshape(-1, head_dim)[:, 0] if place.size == heads * head_dim else None
        if starts is None or (columns != columns[0]).any():
            return Fold(reason="its heads are not the columns of one linear layer")
        if (place.reshape(-1, head_dim) != starts[:, None] + np.arange(head_dim)).any():
            return Fold(reason="the columns of its heads are not in order")
        found = self._weight(reader)
        if isinstance(found, str):
            return Fold(reason=found)
        weight, flipped = found
        record = WeightRotation.by(
            applied.rotation, self.weights[weight], 1 if flipped else 0, tuple(int(start) for start in starts)
        )
        return Fold((record,))


def _between(operator: str) -> str:
    if operator == "multiply":
        return "a gate (an elementwise product) lies between"
    return f"{'a norm' if operator in NORMS else operator or 'another function'} lies between"
