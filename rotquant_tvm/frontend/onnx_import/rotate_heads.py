"""The rotary embedding, in the form that transformers' models have and later passes recognize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tvm import relax
from tvm.relax import op as R

Emit = Callable[[relax.Expr], relax.Var]


@dataclass
class RotaryAngles:
    """Cosines and sines of a call's tokens, [batch or 1, 1, seq, dim / 2] each, in the dtype of what they turn."""

    cos: relax.Var
    sin: relax.Var
    _doubled: list[relax.Var] = field(default_factory=list, init=False, repr=False)

    @property
    def dim(self) -> int:
        """How many of a head's dimensions are turned: the first ones."""
        return 2 * int(self.cos.ty.shape[3])

    def doubled(self, emit: Emit) -> list[relax.Var]:
        """Cosines and sines for both halves of a head, [batch or 1, 1, seq, dim]; made once for all that they turn."""
        if not self._doubled:
            self._doubled = [emit(R.concat([part, part], axis=3)) for part in (self.cos, self.sin)]
        return self._doubled


def rotate(emit: Emit, x: relax.Expr, angles: RotaryAngles, interleaved: bool) -> relax.Var:
    """Turn ``x`` [batch, heads, seq, head_dim] by the angles; dimensions past ``angles.dim`` stay.

    The pair i of a head is (i, i + dim / 2), or (2 i, 2 i + 1) if ``interleaved``.
    """
    head_dim = int(x.ty.shape[3])
    turn = _turn_neighbours if interleaved else _turn_halves
    if angles.dim == head_dim:
        return turn(emit, x, angles)
    turned = turn(emit, _dims(emit, x, 0, angles.dim), angles)
    return emit(R.concat([turned, _dims(emit, x, angles.dim, head_dim)], axis=3))


def _turn_halves(emit: Emit, x: relax.Expr, angles: RotaryAngles) -> relax.Var:
    half = angles.dim // 2
    cos, sin = angles.doubled(emit)
    upper = emit(R.negative(_dims(emit, x, half, 2 * half)))
    swapped = emit(R.concat([upper, _dims(emit, x, 0, half)], axis=3))
    return emit(R.add(emit(R.multiply(x, cos)), emit(R.multiply(swapped, sin))))


def _turn_neighbours(emit: Emit, x: relax.Expr, angles: RotaryAngles) -> relax.Var:
    shape = list(x.ty.shape)
    pairs = emit(R.reshape(x, [*shape[:3], shape[3] // 2, 2]))
    one, two = (emit(R.take(pairs, relax.const(i, "int64"), axis=4, mode="clip")) for i in (0, 1))
    first = emit(R.subtract(emit(R.multiply(one, angles.cos)), emit(R.multiply(two, angles.sin))))
    second = emit(R.add(emit(R.multiply(one, angles.sin)), emit(R.multiply(two, angles.cos))))
    return emit(R.reshape(emit(R.stack([first, second], axis=4)), shape))


def _dims(emit: Emit, x: relax.Expr, begin: int, end: int) -> relax.Var:
    return emit(R.strided_slice(x, axes=[3], begin=[begin], end=[end]))
