"""Which index of an attention is which: batch, heads, queries, keys and head dimension."""

from __future__ import annotations

from dataclasses import dataclass

from .axes import Axes, Axis, AxisSpace
from .layouts import View
from .mismatch import Mismatch


@dataclass(frozen=True)
class Roles:
    """The atoms of each role; a query head is (kv head, group), the group running faster."""

    batch: Axis
    kv_heads: Axis
    groups: Axis
    queries: Axis
    keys: Axis
    head_dim: Axis
    value_dim: Axis

    @property
    def heads(self) -> Axis:
        """The query heads."""
        return (*self.kv_heads, *self.groups)

    @property
    def query_layout(self) -> Axes:
        """Queries as [batch, heads, queries, head_dim]."""
        return self.batch, self.heads, self.queries, self.head_dim

    @property
    def key_layout(self) -> Axes:
        """Keys as [batch, kv_heads, keys, head_dim]."""
        return self.batch, self.kv_heads, self.keys, self.head_dim

    @property
    def value_layout(self) -> Axes:
        """Values as [batch, kv_heads, keys, value_dim]."""
        return self.batch, self.kv_heads, self.keys, self.value_dim

    @property
    def output_layout(self) -> Axes:
        """The result as [batch, heads, queries, value_dim]."""
        return self.batch, self.heads, self.queries, self.value_dim

    @property
    def mask_layout(self) -> Axes:
        """A mask as [batch, 1, queries, keys]."""
        return self.batch, (), self.queries, self.keys


@dataclass(frozen=True)
class Sources:
    """What roles are read from, each with its unsplit atoms: the operands' sources and the tensors between.

    ``scores`` is the product of queries and keys, ``rows`` its axis of queries, ``views`` the tensors from it to the
    weights, ``operand_views`` those of queries, keys and values, ``masks`` the atoms that masks have.
    """

    queries: Axis
    keys: Axis
    values: Axis
    scores: Axis
    rows: Axis
    softmax_axis: Axis
    contracted: Axis
    result: Axes
    masks: Axis
    views: tuple[View, ...]
    operand_views: tuple[View, ...]


def find_roles(space: AxisSpace, sources: Sources) -> Roles:
    """Assign the roles; raises Mismatch naming the product if the operands do not share indices as in attention."""
    queries, keys, values = set(sources.queries), set(sources.keys), set(sources.values)
    head_dim, length = sources.contracted, sources.softmax_axis
    _require(set(head_dim) <= queries & keys, "the head dimension is repeated")
    _require(set(length) <= keys & values, "one key or one value serves the whole sequence")
    _require(not set(length) & queries, "the softmax is not over the keys")
    between = [atom for atom in sources.scores if atom not in length]
    _require(set(between) <= queries, "queries are repeated")
    shared = tuple(atom for atom in between if atom in keys and atom in values)
    own = tuple(atom for atom in between if atom not in keys and atom not in values)
    _require(len(shared) + len(own) == len(between), "keys and values do not have the same heads")
    value_axes = [
        atoms for axis in sources.result if (atoms := tuple(a for a in axis if a not in sources.scores))
    ]
    _require(len(value_axes) <= 1, "weights are repeated")
    batch = _batch(space, shared, sources)
    _require(not _first_axis_own(space, own, shared, sources), "keys are shared by the rows of a batch")
    rows = _rows(space, sources, own)
    kv_heads = tuple(atom for atom in shared if atom not in batch)
    groups = tuple(atom for atom in own if atom not in rows)
    return Roles(batch, kv_heads, groups, rows, length, head_dim, value_axes[0] if value_axes else ())


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise Mismatch("relax.matmul", reason)


def _rank4(space: AxisSpace, views: tuple[View, ...]) -> list[Axes]:
    return [tuple(map(space.resolve, axes)) for _, axes in views if len(axes) >= 4]


def _batch(space: AxisSpace, shared: Axis, sources: Sources) -> Axis:
    """Return the atoms that are the batch: the first axis of scores of rank 4, or of an operand of rank 4."""
    for axes in _rank4(space, sources.views):
        return tuple(atom for atom in shared if atom in axes[0])
    if len(shared) != 1:
        return shared[:1]
    sequence = {*sources.rows, *sources.softmax_axis}
    for axes in _rank4(space, sources.operand_views):
        others = [axis for axis in axes if not sequence & set(axis)]
        if any(shared[0] in axis for axis in others):
            return shared if shared[0] in others[0] else ()
    return shared


def _first_axis_own(space: AxisSpace, own: Axis, shared: Axis, sources: Sources) -> bool:
    """Whether the first axis of scores of rank 4, the batch, is one that keys do not have."""
    return any(set(axes[0]) & set(own) and not set(axes[0]) & set(shared) for axes in _rank4(space, sources.views))


def _rows(space: AxisSpace, sources: Sources, own: Axis) -> Axis:
    """Return the query positions among the axis of queries, which may hold heads too where all share one key head."""
    rows = tuple(atom for atom in sources.rows if atom in own)
    if len(rows) <= 1:
        return rows
    masked = tuple(atom for atom in rows if atom in sources.masks)
    dynamic = tuple(atom for atom in rows if atom.extent.constant is None)
    return masked or dynamic or rows[-1:]
