"""Rotations of several layers whose vectors move between layers so that every block lies within a lane: the plan.

Where head_dim and all strides and blocks are powers of two, bit s of a dim is a *form*: the exclusive or of some bits
of the register's number and of the lane's. At first each is one bit of either. A layer is local if its dims' bits are
bits of registers; those that are not are brought there before it, in exchange for bits of the layer before, which has
no more use for them. Bit j of the register's number against bit k of the lane's: lanes swap the registers with bit j
set with the lane across bit k, one shuffle for every other register. For this to be a swap of the two dims' bits, a
lane with bit k set must hold its elements in the other order, which costs nothing: the layer before writes its outputs
in any order that its weights say.

Two bits at once cost three shuffles for every four registers, so a block of four that lies across lanes takes 3/4 of a
shuffle per element and not the 3 that gathering its inputs takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm.tirx as tir

from .cuda_ops import scalar
from .vector_lanes_cuda import VectorLanes

Expr = Any
Structure = Sequence[tuple[int, int]]
LARGEST_BLOCK = 4


def _bits(number: int) -> int | None:
    """The logarithm of a power of two; None of other numbers."""
    return number.bit_length() - 1 if number > 0 and number & (number - 1) == 0 else None


@dataclass(frozen=True)
class Layout:
    """Where dims are: bit s of the dim in register r of lane l is the parity of (l | r << ``lane_bits``) & forms[s]."""

    lane_bits: int
    forms: tuple[int, ...]

    @classmethod
    def of(cls, lanes: VectorLanes) -> Layout | None:
        """The layout of vectors as they are read; None where they do not fill a power of two of lanes and registers."""
        access, across, dims = _bits(lanes.access), _bits(lanes.lanes), _bits(lanes.head_dim)
        if access is None or across is None or dims is None or lanes.elements * lanes.lanes != lanes.head_dim:
            return None
        order = [across + s for s in range(access)]
        order += list(range(across)) + [across + s for s in range(access, dims - across)]
        return cls(across, tuple(1 << bit for bit in order))

    def combine(self, target: int, source: int) -> Layout:
        """The layout after replacing bit ``target`` of a place by its exclusive or with bit ``source``."""
        return Layout(self.lane_bits, tuple(f ^ (f >> target & 1) << source for f in self.forms))

    def step(self, bit: int) -> int | None:
        """What to flip in a register's number to flip this bit of the dim alone; None if that is in another lane."""
        for register in range(1, 1 << len(self.forms) - self.lane_bits):
            if self.dim(register << self.lane_bits) == 1 << bit:
                return register
        return None

    def dim(self, place: int) -> int:
        """The dim at a place (lane and register)."""
        return sum((place & form).bit_count() % 2 << s for s, form in enumerate(self.forms))

    def emit_dim(self, place: Expr, bits: Sequence[int] | None = None) -> Expr:
        """Emit ``dim``, or some of its bits moved together, the first lowest."""
        shifts: dict[int, int] = {}
        for to, s in enumerate(range(len(self.forms)) if bits is None else bits):
            for source in range(len(self.forms)):
                if self.forms[s] >> source & 1:
                    shifts[to - source] = shifts.get(to - source, 0) | 1 << source
        total: Expr = tir.const(0, "int32")
        for shift, mask in shifts.items():
            part = place & tir.const(mask, "int32")
            total = total ^ (part << shift if shift >= 0 else part >> -shift)
        return scalar(total)


@dataclass(frozen=True)
class LocalLayer:
    """A layer whose blocks lie within lanes, and the exchange after it.

    ``steps``: what to flip in a register's number to come to the block's element with this place's bit flipped.
    """

    block: int
    bits: tuple[int, ...]
    inputs: Layout
    outputs: Layout
    steps: tuple[int, ...]
    exchanges: tuple[tuple[int, int], ...] = ()

    @property
    def after(self) -> Layout:
        """The layout after the exchange."""
        layout = self.outputs
        for own, other in self.exchanges:
            layout = layout.combine(other, layout.lane_bits + own)
        return layout

    def across(self, register: int) -> int:
        """With which lane the register is swapped in the exchange: what to flip in the lane's number."""
        mask = 0
        for own, other in self.exchanges:
            mask ^= (register >> own & 1) << other
        return mask

    def neighbour(self, register: int, tap: int) -> int:
        """The register of the block's element whose place differs by ``tap``."""
        for k, step in enumerate(self.steps):
            register ^= step if tap >> k & 1 else 0
        return register


def plan(lanes: VectorLanes, structure: Structure) -> list[LocalLayer] | None:
    """The layers and their exchanges; None where there is no such plan."""
    layout = Layout.of(lanes)
    layers: list[LocalLayer] = []
    for block, stride in structure:
        width, first = _bits(block), _bits(stride)
        known = width is not None and first is not None and block <= LARGEST_BLOCK and block * stride <= lanes.head_dim
        if layout is None or not known:
            return None
        bits = tuple(range(first or 0, (first or 0) + (width or 0)))
        for bit in bits:
            if layout.step(bit) is None:
                brought = _bring(layers[-1], bit, bits) if layers else None
                if brought is None:
                    return None
                layers[-1], layout = brought, brought.after
        layers.append(LocalLayer(block, bits, layout, layout, tuple(layout.step(bit) or 0 for bit in bits)))
    return layers or None


def _bring(layer: LocalLayer, bit: int, wanted: Sequence[int]) -> LocalLayer | None:
    """Add to the layer's exchange the one that brings a dim's bit from the lane's number into the register's."""
    after, used = layer.after, {own for own, _ in layer.exchanges}
    other = _bits(after.forms[bit])
    for own_bit, step in zip(layer.bits, layer.steps, strict=True):
        own = _bits(step)
        if own is None or own in used or own_bit in wanted or other is None or other >= after.lane_bits:
            continue
        outputs = layer.outputs.combine(after.lane_bits + own, other)
        return replace(layer, outputs=outputs, exchanges=(*layer.exchanges, (own, other)))
    return None
