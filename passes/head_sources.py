"""Where the dimensions of heads come from: the columns of a linear layer, and the pairs that a rotary embedding turns.

Found by ``FeatureProbe``: the columns that a dimension depends on show in what is left of it when other columns are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from .feature_probe import FeatureProbe

CLOSE = 1e-9
HEADS_AXIS = {"q": 2, "k": 1, "v": 1}
"""Which axis counts the heads: queries are [b, s, h, d], new keys and values [b, h, s, d]."""


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding: ``dims`` of a head's dimensions are turned, in ``pairs`` "half-split" or "interleaved".

    ``pairs`` is "none" if no dimension is turned, and "other" for any other pairing.
    """

    dims: int
    head_dim: int
    pairs: str

    @property
    def kind(self) -> str:
        """``none``, ``full`` or ``partial``."""
        return "none" if not self.dims else "full" if self.dims == self.head_dim else "partial"


@dataclass(frozen=True)
class HeadSource:
    """What heads are made of.

    ``source`` is the tensor [..., features] whose columns they hold; ``columns`` int64 [heads, head_dim, 2] are the one
    or two (else -1) that each dimension depends on; ``inside`` are the variables between, ``nonlinear`` the operators
    that read the same data and are not followed (a norm's).
    """

    probe: FeatureProbe
    end: relax.Var
    heads_axis: int
    source: relax.Var
    columns: NDArray[np.int64]
    inside: frozenset[relax.Var]
    nonlinear: tuple[str, ...]

    @classmethod
    def of(cls, probe: FeatureProbe, end: relax.Var, heads_axis: int) -> HeadSource | None:
        """Return the source of ``end``, [b, h, s, d] or [b, s, h, d]; None if it has no single one, or no columns."""
        inside, leaves = probe.region(end)
        data = [leaf for leaf in leaves if leaf in probe.ids_dependent]
        first = [leaf for leaf in data if not any(probe.reaches(other, leaf) for other in data)]
        if len(first) != 1:
            return None
        source = _with_bias(probe, first[0], inside)
        columns = _Columns(probe, end, source, heads_axis).find()
        if columns is None:
            return None
        between = frozenset(probe.after(source, inside) - {source})
        others = tuple(probe.operator(leaf) for leaf in data if not leaf.same_as(first[0]))
        return cls(probe, end, heads_axis, source, columns, between, others)

    @property
    def starts(self) -> tuple[int, ...] | None:
        """The first column of each head, if every head's columns are consecutive."""
        used = np.sort(np.unique(self.columns[self.columns >= 0]))
        heads, head_dim, _ = self.columns.shape
        if used.size != heads * head_dim:
            return None
        owned = np.where(self.columns < 0, self.columns[..., :1], self.columns)
        first, last = owned.min((1, 2)), owned.max((1, 2))
        return tuple(int(start) for start in first) if np.all(last - first == head_dim - 1) else None

    @property
    def in_order(self) -> bool:
        """Whether dimension i of every head holds its column i, perhaps mixed with one other."""
        starts = self.starts
        if starts is None:
            return False
        wanted = np.asarray(starts)[:, None] + np.arange(self.columns.shape[1])
        return bool((self.columns == wanted[..., None]).any(-1).all())

    @property
    def rotary(self) -> Rotary:
        """The pairs of dimensions that share two columns."""
        head = np.sort(self.columns[0], axis=-1)
        paired = np.flatnonzero(head[:, 0] >= 0)
        same = (head[:, None] == head[None]).all(-1) & ~np.eye(len(head), dtype=bool)
        head_dim = len(head)
        if not paired.size or not np.all(same[paired].sum(-1) == 1):
            return Rotary(0 if not paired.size else paired.size, head_dim, "other" if paired.size else "none")
        partner = same[paired].argmax(-1)
        place = np.arange(paired.size)
        if np.array_equal(np.searchsorted(paired, partner), place ^ 1) and np.all(abs(partner - paired) == 1):
            return Rotary(paired.size, head_dim, "interleaved")
        half = np.array_equal(np.searchsorted(paired, partner), (place + paired.size // 2) % paired.size)
        return Rotary(paired.size, head_dim, "half-split" if half else "other")

    def equivariant(self, matrix: NDArray[np.float64]) -> bool:
        """Whether mapping the columns of every head by ``matrix`` [d, d] maps every head by it."""
        starts = self.starts
        if starts is None:
            return False
        data = np.random.default_rng(1).standard_normal(self.probe.shape(self.source))
        mapped = data.copy()
        for start in starts:
            block = slice(start, start + len(matrix))
            mapped[..., block] = data[..., block] @ matrix.T
        before, after = (self.probe.evaluate(self.end, {self.source: x}) for x in (data, mapped))
        return bool(np.allclose(after, before @ matrix.T, rtol=0, atol=CLOSE * max(1.0, np.abs(before).max())))


def _with_bias(probe: FeatureProbe, product: relax.Var, inside: set[relax.Var]) -> relax.Var:
    """The sum with a bias of one parameter per column, where nothing else reads the product; else the product."""
    readers = probe.readers(product)
    if len(readers) == 1 and readers[0] in inside and bias_of(probe, readers[0], product) is not None:
        return readers[0]
    return product


def bias_of(probe: FeatureProbe, total: relax.Var, product: relax.Var) -> relax.Var | None:
    """The parameter [features] that ``total`` adds to a product [..., features]."""
    if probe.operator(total) != "add":
        return None
    others = [arg for arg in probe.value(total).args if not arg.same_as(product)]
    found = [arg for arg in others if isinstance(arg, relax.Var) and any(arg.same_as(p) for p in probe.func.params)]
    if len(found) != 1 or found[0].ty.ndim != 1:
        return None
    return found[0] if probe.shape(found[0]) == probe.shape(product)[-1:] else None


@dataclass(frozen=True)
class _Columns:
    """Finds the columns of ``source`` that each dimension of ``end`` depends on."""

    probe: FeatureProbe
    end: relax.Var
    source: relax.Var
    heads_axis: int

    def find(self) -> NDArray[np.int64] | None:
        """int64 [heads, head_dim, 2], -1 where there is no second one; None where there are more."""
        shape = self.probe.shape(self.source)
        features = shape[-1]
        if all(self.probe.only_moves(var) for var in self.probe.region(self.end)[0] if not var.same_as(self.source)):
            ids = self._heads(np.broadcast_to(np.arange(features), shape)).astype(np.int64)
            return np.stack([ids, np.full_like(ids, -1)], -1)
        data = np.random.default_rng(2).standard_normal(shape)
        zero = self._heads(np.zeros(shape))
        whole = self._heads(data) - zero
        bits = max(1, (features - 1).bit_length())
        masks = [(np.arange(features) >> bit) & 1 for bit in range(bits)]
        parts = np.stack([self._heads(data * mask) - zero for mask in masks])
        return _two_columns(whole, parts, features)

    def _heads(self, data: NDArray[np.float64]) -> NDArray[np.float64]:
        """The first token's heads [heads, head_dim]."""
        heads: Any = self.probe.evaluate(self.end, {self.source: data})
        return np.asarray(heads[0, :, 0] if self.heads_axis == 1 else heads[0, 0], np.float64)


def _two_columns(whole: NDArray[np.float64], parts: NDArray[np.float64], features: int) -> NDArray[np.int64] | None:
    """Read the numbers of the columns, bit by bit, from the values that are left with the columns of one bit alone.

    A value that is the sum of two columns' shares is left whole where both numbers have the bit, vanishes where
    neither has it, and else is one share, which tells the two apart.
    """
    if np.any(np.abs(whole) < CLOSE):
        return None
    near = CLOSE * np.abs(parts).max()
    both, neither = abs(parts - whole) <= near, abs(parts) <= near
    some = ~(both | neither)
    first_bit = some.argmax(0)
    share = np.take_along_axis(parts, first_bit[None], 0)[0]
    first, second = abs(parts - share) <= near, abs(parts - (whole - share)) <= near
    if not np.all(both | neither | first | second):
        return None
    weights = 2 ** np.arange(len(parts))[:, None, None]
    pair = some.any(0)
    one = np.where(pair, (weights * (both | (some & first))).sum(0), (weights * both).sum(0))
    two = np.where(pair, (weights * (both | (some & second & ~first))).sum(0), -1)
    found = np.stack([one, two], -1).astype(np.int64)
    return found if found.max() < features else None


def escaping(source: HeadSource, last: relax.Var) -> relax.Var | None:
    """A variable that reads the source's columns other than on the way to ``last``; None if there is none.

    Columns of other heads (of a packed weight's) do not count.
    """
    probe, wanted = source.probe, np.unique(source.columns[source.columns >= 0])
    shape = probe.shape(source.source)
    waiting: list[tuple[relax.Var, Any]] = [(source.source, np.broadcast_to(np.arange(shape[-1]), shape))]
    moved: set[relax.Var] = set()
    while waiting:
        var, held = waiting.pop()
        moved.add(var)
        if var.same_as(last):
            continue
        if var.same_as(probe.func.body.body):
            return var
        for reader in probe.readers(var):
            if probe.only_moves(reader):
                result = probe.evaluate(reader, {var: held})
                parts = result if isinstance(result, list) else [result]
                if any(np.isin(part, wanted).any() for part in parts):
                    waiting.append((reader, result))
            elif reader not in source.inside:
                return reader
    for var in source.inside - moved - {last}:
        outside = [reader for reader in probe.readers(var) if reader not in source.inside]
        if outside:
            return outside[0]
    return None
