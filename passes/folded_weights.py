"""Rotations that weights have taken over: how they are written into a function, and applied to the weights' values."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from tvm import relax

from rotquant_tvm.formats import Rotation

FOLDS_ATTR = "rotquant.weight_rotations"
"""JSON: {"rotations": [{head_dim, structure, data (float32, base64)}], "weights": [{weight, axis, starts, rotation}]}.

``weight`` counts the weights of the function as it was imported.
"""


@dataclass(frozen=True)
class WeightRotation:
    """Blocks of a weight along ``axis``, at ``starts``, are multiplied by a rotation: block ← R · block."""

    weight: int
    axis: int
    starts: tuple[int, ...]
    head_dim: int
    structure: tuple[tuple[int, int], ...]
    data: bytes

    @classmethod
    def by(cls, rotation: Rotation, weight: int, axis: int, starts: tuple[int, ...]) -> WeightRotation:
        """Return the record for a rotation."""
        return cls(weight, axis, starts, rotation.head_dim, rotation.structure, rotation.data.tobytes())

    @property
    def rotation(self) -> Rotation:
        """The rotation, as its kernel would apply it (coefficients of float32)."""
        return Rotation.from_data(self.head_dim, self.structure, np.frombuffer(self.data, np.float32))

    @property
    def positions(self) -> set[tuple[int, int, int]]:
        """(weight, axis, index) of everything that changes."""
        return {(self.weight, self.axis, s + i) for s in self.starts for i in range(self.head_dim)}

    def apply(self, weight: np.ndarray) -> np.ndarray:
        """Return the rotated weight, computed in float64 and rounded once to the weight's own dtype."""
        matrix = self.rotation.matrix()
        result = np.array(weight)
        view, source = np.moveaxis(result, self.axis, 0), np.moveaxis(weight, self.axis, 0)
        for start in self.starts:
            block = slice(start, start + self.head_dim)
            view[block] = np.tensordot(matrix, source[block].astype(np.float64), 1).astype(weight.dtype)
        return result


class FoldedWeights(Sequence[np.ndarray]):
    """The weights of the original function, those with a record rotated as they are asked for."""

    def __init__(self, weights: Sequence[np.ndarray], records: Sequence[WeightRotation]) -> None:
        self.weights = weights
        self.records: dict[int, list[WeightRotation]] = {}
        for record in records:
            self.records.setdefault(record.weight, []).append(record)

    def __len__(self) -> int:
        return len(self.weights)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        weight = self.weights[index]
        for record in self.records.get(range(len(self.weights))[index], ()):
            weight = record.apply(weight)
        return weight


def with_weight_rotations(func: relax.Function, records: Sequence[WeightRotation]) -> relax.Function:
    """The function, saying which rotations its weights must take over; unchanged if there are none."""
    if not records:
        return func
    known: dict[tuple[Any, ...], int] = {}
    weights = []
    for r in records:
        number = known.setdefault((r.head_dim, r.structure, r.data), len(known))
        weights.append({"weight": r.weight, "axis": r.axis, "starts": r.starts, "rotation": number})
    rotations = [
        {"head_dim": head_dim, "structure": structure, "data": base64.b64encode(data).decode()}
        for head_dim, structure, data in known
    ]
    return func.with_attr(FOLDS_ATTR, json.dumps({"rotations": rotations, "weights": weights}))


def weight_rotations(func: relax.Function) -> list[WeightRotation]:
    """What ``with_weight_rotations`` wrote; empty if nothing."""
    text = (func.attrs or {}).get(FOLDS_ATTR)
    if text is None:
        return []
    document = json.loads(str(text))
    return [
        WeightRotation(
            w["weight"],
            w["axis"],
            tuple(w["starts"]),
            r["head_dim"],
            tuple((block, stride) for block, stride in r["structure"]),
            base64.b64decode(r["data"]),
        )
        for w in document["weights"]
        for r in [document["rotations"][w["rotation"]]]
    ]
