"""How the weights of a rewritten function are made from those of the original one; a function carries its recipes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from tvm import relax

from ..schedules.linear_llvm import pack_weight
from .folded_weights import FoldedWeights, weight_rotations

RECIPES_ATTR = "rotquant.weight_recipes"


@dataclass(frozen=True)
class WeightRecipe:
    """How to make one weight parameter of the rewritten function from those of the original one.

    ``sources`` are indices among the original function's weights (parameter ``num_input`` is weight 0);
    ``transposed`` tells which sources are stored ``[in_features, out_features]``. ``tile`` 0 means the sources as
    ``[out_features, in_features]``, one after the other (the only one unchanged), else they are packed and joined along
    the tiles.
    """

    name: str
    sources: tuple[int, ...]
    transposed: tuple[bool, ...]
    tile: int

    @property
    def unchanged(self) -> bool:
        """Whether the weight is its source."""
        return not self.tile and self.transposed == (False,)

    def make(self, weights: Sequence[np.ndarray]) -> np.ndarray:
        """Return the new weight, given all original ones (any sequence that yields arrays by index)."""
        if self.unchanged:
            return weights[self.sources[0]]
        arrays = [
            weights[index].T if transposed else weights[index]
            for index, transposed in zip(self.sources, self.transposed, strict=True)
        ]
        if self.tile:
            arrays = [pack_weight(array, self.tile) for array in arrays]
        return np.ascontiguousarray(arrays[0]) if len(arrays) == 1 else np.concatenate(arrays)


def weight_recipes(func: relax.Function) -> tuple[WeightRecipe, ...]:
    """One recipe per weight of ``func``, in order; all "unchanged" where no pass has changed them."""
    text = (func.attrs or {}).get(RECIPES_ATTR)
    if text is None:
        weights = func.params[num_input(func) :]
        return tuple(WeightRecipe(w.name, (i,), (False,), 0) for i, w in enumerate(weights))
    records = json.loads(str(text))
    return tuple(
        WeightRecipe(r["name"], tuple(r["sources"]), tuple(r["transposed"]), r["tile"]) for r in records
    )


def with_recipes(func: relax.Function, recipes: Sequence[WeightRecipe]) -> relax.Function:
    """The function, carrying the recipes of its weights."""
    return func.with_attr(RECIPES_ATTR, json.dumps([asdict(recipe) for recipe in recipes]))


def make_weights(func: relax.Function, weights: Sequence[np.ndarray]) -> Iterable[np.ndarray]:
    """Yield the weights for the rewritten ``func`` in order, from all weights of the original function.

    These stay as they are: rotations that weights take over (``folded_weights``) are applied to copies.
    """
    if records := weight_rotations(func):
        weights = FoldedWeights(weights, records)
    return (recipe.make(weights) for recipe in weight_recipes(func))


def num_input(func: relax.Function) -> int:
    """How many of the parameters are inputs; the others are weights."""
    return int((func.attrs or {}).get("num_input", 0))
