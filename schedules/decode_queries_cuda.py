"""The queries of a thread block in decode attention, on CUDA: loaded, and rotated and rounded where that is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rotquant_tvm.formats import Codec
from rotquant_tvm.ops.online_softmax import LOG2E

from .cuda_ops import Registers, f32, half2, load_words, scalar
from .decode_place_cuda import DecodePlace
from .decode_scores_cuda import LoadQuery
from .packed_stream_cuda import integer
from .query_rotation_cuda import SharedRows
from .rounded_queries_cuda import RoundedQueries

Expr = Any


class DecodeQueries:
    """Queries ``q`` [batch, 1, heads, head_dim]; raw ones are rotated by the block's threads, in ``rows``."""

    def __init__(self, place: DecodePlace, codec: Codec, q: Any, rows: SharedRows, coefficients: Any) -> None:
        self.place, self.codec, self.q, self.rows, self.coefficients = place, codec, q, rows, coefficients
        self.scale = place.shape.scale * LOG2E
        self.row = scalar(place.lane_row)
        self._rounded: RoundedQueries | None = None

    def ask(self) -> Callable[[], None]:
        """Begin to load them; calling what is returned waits for them and makes them ready to be taken."""
        if not self.place.shape.rotated:
            self.load = self._from_registers()
            return lambda: None
        rows, structure = self.rows, self.codec.rotation.structure
        ahead = rows.ask(structure, self.coefficients)
        put = rows.hold(lambda row, dim: self.q[self.place.b, 0, self.place.query_head(row), dim])

        def rotate() -> None:
            put(lambda row, dim, value: rows.put(row, dim, f32(value)))
            rows.rotate(structure, self.coefficients, ahead)
            if integer(self.codec) and self.codec.head_dim >= RoundedQueries.SMALLEST:
                self._rounded = RoundedQueries(rows, self.place.lane, self.place.warp, self.place.warps)
                self._rounded.round(self.scale)

        self.load = self._from_shared
        return rotate

    def start(self, keys: Any) -> None:
        """Hand them to the scores of the packed tiles."""
        if self._rounded is None:
            keys.start(self.load, self.scale)
        else:
            self._rounded.fetch(keys, self.row)

    def _from_registers(self) -> LoadQuery:
        steps, single = self.codec.head_dim // 16, self.place.shape.dtype == "float32"
        each = 4 if single else 2
        words = Registers(each * steps, "float32" if single else "uint32")
        for step in range(steps):
            index = [self.place.b, 0, self.place.query_head(self.row), 16 * step + 4 * (self.place.lane % 4)]
            load_words(words, each * step, self.q, index, each, "global")

        def load(step: int) -> list[Expr]:
            found = [words[each * step + k] for k in range(each)]
            return found if single else [value for word in found for value in half2(word)]

        return load

    def _from_shared(self, step: int) -> list[Expr]:
        values, rows = Registers(4, "float32"), self.rows
        load_words(values, 0, rows.shared, [rows.at(self.row, 16 * step + 4 * (self.place.lane % 4))], 4, "shared")
        return list(values)
