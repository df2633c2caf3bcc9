"""Axes of tensors as rows of atoms: what a reshape cannot take apart, followed through every change of layout.

The axis of merged batch and heads is a row of two atoms, an axis of extent 1 an empty row. Two tensors that share an
atom run over the same index, whatever their layouts are. An atom that turns out to be a product is split in place,
so that axes noted before stay right; ``resolve`` gives their present atoms.
"""

from __future__ import annotations

from tvm import relax, tirx

from .extents import ONE, Extent, ExtentTable, product


class Atom:
    """One index; ``parts`` are the atoms that it was split into."""

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.parts: tuple[Atom, ...] = ()


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


class AxisSpace:
    """Makes and splits the atoms of one analysis."""

    def __init__(self, table: ExtentTable) -> None:
        self.table = table

    def axis(self, size: tirx.PrimExpr | int) -> Axis:
        """Return a new axis of this size."""
        extent = self.table.extent(size)
        return () if extent.is_one else (Atom(extent),)

    def axes(self, shape: list[tirx.PrimExpr]) -> Axes:
        """Return new axes of a tensor of this shape."""
        return tuple(self.axis(size) for size in shape)

    def resolve(self, axis: Axis) -> Axis:
        """Return the unsplit atoms of an axis."""
        return tuple(leaf for atom in axis for leaf in (self.resolve(atom.parts) if atom.parts else (atom,)))

    def atoms(self, axes: Axes) -> Axis:
        """Return the unsplit atoms of all axes of a tensor, in order."""
        return tuple(atom for axis in axes for atom in self.resolve(axis))

    def size(self, axis: Axis) -> tirx.PrimExpr:
        """Return the size of an axis."""
        return self.table.size(product([atom.extent for atom in self.resolve(axis)]))

    def align(self, axis: Axis, sizes: list[tirx.PrimExpr | int]) -> Axes | None:
        """Deal the atoms of one axis out to axes of these sizes, splitting where needed; None if that fails."""
        pool = list(self.resolve(axis))
        aligned = []
        for size in sizes:
            taken: list[Atom] = []
            missing = self.table.extent(size)
            while not missing.is_one:
                if not pool:
                    return None
                atom = pool.pop(0)
                rest = missing.over(atom.extent)
                if rest is None and (left := atom.extent.over(missing)) is not None:
                    atom.parts = Atom(missing), Atom(left)
                    pool.insert(0, atom.parts[1])
                    atom, rest = atom.parts[0], ONE
                if rest is None:
                    return None
                taken.append(atom)
                missing = rest
            aligned.append(tuple(taken))
        return None if pool else tuple(aligned)


def shape_of(expr: relax.Expr) -> list[tirx.PrimExpr] | None:
    """Return the sizes of a tensor, or None if they are unknown."""
    shape = getattr(expr.ty, "shape", None)
    if isinstance(shape, relax.Var):
        shape = shape.ty
    values = getattr(shape, "values", None)
    return None if values is None else list(values)
