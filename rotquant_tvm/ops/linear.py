"""Linear layers: y = x Wᵀ (+ bias) (+ residual), or silu(x Gᵀ) · (x Uᵀ), several of one x at once.

The definition says what the kernels of ``schedules`` compute; their weights lie as they are stored or in tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tvm import te, tirx

from .model_op import model_attrs

LINEAR = "linear"
"""The operator's name."""


@dataclass(frozen=True)
class LinearShape:
    """What a kernel is specialized on.

    ``out_features`` and ``bias`` have an entry per layer; ``residual`` (one layer only) adds a tensor of y's shape;
    ``gated`` (two layers of one size) gives silu(first) · second alone; ``leading`` symbolic sizes stand before the
    features. ``tile`` 0: the weight is [sum of out_features, in_features]; else every layer's is
    [ceil(out_features / tile), in_features, tile], one after the other.
    """

    in_features: int
    out_features: tuple[int, ...]
    bias: tuple[bool, ...]
    residual: bool
    gated: bool
    leading: int
    input_dtype: str
    weight_dtype: str
    output_dtype: str
    tile: int = 0

    @classmethod
    def read(cls, properties: Mapping[str, Any]) -> LinearShape:
        """From the JSON object of ``PROPERTIES_ATTR``."""
        found = dict(properties)
        return cls(**(found | {name: tuple(found[name]) for name in ("out_features", "bias")}))

    def attrs(self) -> dict[str, str]:
        """The attributes of a kernel of this shape."""
        return model_attrs(LINEAR, asdict(self))

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tiles of each layer's weight."""
        return tuple(-(-n // self.tile) for n in self.out_features)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        if self.tile:
            return sum(self.tiles), self.in_features, self.tile
        return sum(self.out_features), self.in_features


def linear(shape: LinearShape) -> tirx.PrimFunc:
    """Define ``linear(x, weight, bias of each layer that has one, residual if any, y of each layer or product)``."""
    lead = [tirx.Var(f"d{i}", "int64") for i in range(shape.leading)]
    x = te.placeholder((*lead, shape.in_features), shape.input_dtype, "x")
    weight = te.placeholder(shape.weight_shape, shape.weight_dtype, "weight")
    sizes = list(enumerate(zip(shape.out_features, shape.bias, strict=True)))
    biases = {i: te.placeholder((n,), shape.output_dtype, f"bias{i}") for i, (n, has) in sizes if has}
    added = te.placeholder((*lead, shape.out_features[0]), shape.output_dtype, "residual")
    residual = added if shape.residual else None
    sums = [_sums(shape, lead, x, weight, layer) for layer in range(len(shape.out_features))]

    def value(layer: int, index: tuple[Any, ...]) -> Any:
        found = sums[layer][index]
        if layer in biases:
            found = found + biases[layer][index[-1]].astype("float32")
        return found + residual[index].astype("float32") if residual is not None else found

    def result(layer: int) -> Callable[..., Any]:
        def element(*index: Any) -> Any:
            found = value(layer, index)
            if shape.gated:
                found = found * tirx.sigmoid(found) * value(1, index)
            return found.astype(shape.output_dtype)

        return element

    outputs = [
        te.compute((*lead, n), result(layer), f"y{layer}")
        for layer, n in enumerate(shape.out_features[:1] if shape.gated else shape.out_features)
    ]
    arguments = [x, weight, *biases.values(), *([residual] if residual is not None else []), *outputs]
    return te.create_prim_func(arguments).with_attrs(shape.attrs())


def _sums(shape: LinearShape, lead: list[Any], x: Any, weight: Any, layer: int) -> Any:
    k = te.reduce_axis((0, shape.in_features), f"k{layer}")

    def product(*index: Any) -> Any:
        *rows, feature = index
        at: tuple[Any, ...]
        if shape.tile:
            at = (sum(shape.tiles[:layer]) + feature // shape.tile, k, feature % shape.tile)
        else:
            at = (sum(shape.out_features[:layer]) + feature, k)
        return te.sum(x[(*rows, k)].astype("float32") * weight[at].astype("float32"), axis=k)

    return te.compute((*lead, shape.out_features[layer]), product, f"sums{layer}")
