"""The output of decode attention on CUDA: the sums of a block's warps are merged, then those of a stream's blocks.

A stream's blocks merge through global memory; a rotation is undone by the block that merges. As a cluster, through
shared memory, they would do so sooner, but a cluster is put on half as many multiprocessors: 10.3 µs against 8.3 at one
sequence of 8,192 tokens, 55 against 40 at 131,072 (H100).
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import Codec

from .cuda_ops import Registers, i32
from .decode_place_cuda import DecodePlace
from .decode_softmax_cuda import SumSlots, merge_slots
from .merge_splits_cuda import Partials, arrives_last, normalized
from .query_rotation_cuda import SharedRows

Expr = Any


class DecodeOutput:
    """Writes ``out`` [batch, 1, heads, head_dim]; ``rows`` are free shared memory.

    ``partials`` and ``arrivals`` (see ``arrives_last``) are for streams of several blocks.
    """

    def __init__(
        self,
        place: DecodePlace,
        codec: Codec,
        out: Any,
        rows: SharedRows,
        coefficients: Any,
        partials: Partials,
        arrivals: Any,
    ) -> None:
        self.place, self.out, self.rows, self.coefficients = place, out, rows, coefficients
        self.structure, self.rotated = codec.inverse_rotation.structure, place.shape.rotated
        self.partials, self.arrivals = partials, arrivals

    def finish(self, own: SumSlots, scale: float, others: tuple[SumSlots, Expr] | None) -> None:
        """Merge what the warps have put into ``own``, times ``scale``, and into ``others``; store the output.

        ``others``: see ``merge_slots``.
        """
        place, rows = self.place, self.rows
        merge_slots(own, scale, place.thread, self._take, others)
        ahead = rows.ask(self.structure, self.coefficients) if self.rotated else None
        last = Registers(1, "int32")
        last[0] = i32(1)
        with T.If(place.splits > 1), T.Then():
            arrived = arrives_last(self.arrivals, place.stream, place.splits, rows.shared, place.thread)
            last[0] = i32(arrived)
            with T.If(arrived), T.Then():
                self.partials.merge(place.stream, place.splits, place.threads, rows.shared, self._put)
        if self.rotated:
            with T.If(last[0] == 1), T.Then():
                rows.rotate(self.structure, self.coefficients, ahead)
                rows.hold(rows.get)(self._store)

    def _take(self, row: Expr, dim: Expr, value: Expr, reference: Expr, total: Expr) -> None:
        """Take one of the block's sums."""
        place = self.place
        with T.If(place.splits == 1):
            with T.Then():
                self._put(row, dim, normalized(value, total))
            with T.Else():
                self.partials.store((place.stream, place.split), row, dim, (value, reference, total))

    def _put(self, row: Expr, dim: Expr, value: Expr) -> None:
        """Take an element of the output, as it is before the rotation is undone."""
        self.rows.put(row, dim, value) if self.rotated else self._store(row, dim, value)

    def _store(self, row: Expr, dim: Expr, value: Expr) -> None:
        place = self.place
        with T.If(place.is_head(row)), T.Then():
            T.buffer_store(self.out, value.astype(place.shape.dtype), [place.b, 0, place.query_head(row), dim])
