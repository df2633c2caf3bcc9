"""The values of one packed tile of a trellis format, for CPU attention.

As ``tile_values_llvm``, but a value depends on the codes of the dims before its own. So a tile is unpacked in two
steps: first the codes, as bytes: vector (2*group + half, s) of 32-bit lanes (g, t) whose bytes are the elements e. Of
keys, the bytes of a row of four lanes are sixteen dims in order; of values, the lanes (·, t) are dims in order, four to
a vector. Then 64 windows at a time: the codes one, two and three dims back are a shuffle of two such vectors, and with
AVX-512's byte permutes the table of 256 int8 values is four registers. Values are left on the int8 grid; their scale
belongs to the gains. Other CPUs read the table in memory.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats.trellis import STATE_BITS, STATES

from .byte_ops_llvm import BYTES, as_bytes, as_words, has_byte_permutes
from .tile_bytes_llvm import GRID_OFFSET, CodeBytes
from .tile_values_llvm import LoadWords, slot_k, slot_v
from .vector_ops import LANES, cast, lanes, pick, splat

Expr = Any


class TrellisValues(CodeBytes):
    """Unpacks one role's codes of a tile. ``layout`` and ``codec`` say how they are stored."""

    @property
    def scratch_words(self) -> int:
        """Words per lane that ``unpack`` needs as scratch: those of the tile, then the codes as bytes."""
        return super().scratch_words + self.section.head_dim // 4

    @property
    def _byte_permutes(self) -> bool:
        return has_byte_permutes(self.target)

    def table(self) -> Any:
        """A buffer with the grid values of the states, int8 for byte permutes, else float32."""
        dtype = "int8" if self._byte_permutes else "float32"
        buffer = T.alloc_buffer((STATES,), dtype, scope="local")
        for state, value in enumerate(self.codec.codebook.grid):
            T.buffer_store(buffer, tir.const(value.astype(dtype).item(), dtype), [state])
        return buffer

    def unpack(self, load: LoadWords, table: Any, words: Any, out: Any) -> None:
        """Fill ``out`` [head_dim*32] from a tile; ``load(i)`` gives words i … i+15, ``words`` is scratch for them."""
        self._codes_of_words(load, words)
        with T.serial(0, self.section.groups // 2) as pair:
            for x, half, s in product(range(2), range(2), range(2)):
                self._values(words, table, out, (pair, x), half, s)

    def unpack_bytes(self, load: LoadWords, table: Any, words: Any, out: Any, first: Expr) -> None:
        """As ``GridBytes.unpack_bytes``; only where there are byte permutes."""
        self._codes_of_words(load, words)
        with T.serial(0, self.section.groups // 2) as pair:
            for x, half, s in product(range(2), range(2), range(2)):
                found = self._lookup_bytes(self._states(words, (pair, x), half, s), table)
                at = first + ((pair * 2 + x) * 4 + (half * 2 + s)) * LANES
                T.buffer_store(out, found ^ splat(GRID_OFFSET * 0x01010101, "uint32"), [lanes(at)])

    def _codes_of_words(self, load: LoadWords, words: Any) -> None:
        """Read the words of a tile into the scratch, and their codes as bytes behind them."""
        self._deinterleave(load, words)
        self.unpack_codes(words, lambda vector, codes: T.buffer_store(words, codes, [self._place(vector)]))

    def _place(self, vector: Expr) -> Expr:
        """Where vector number ``vector`` of the codes as bytes stands in the scratch."""
        return lanes(super().scratch_words * 32 + vector * LANES)

    def _values(self, words: Any, table: Any, out: Any, group: tuple[Expr, int], half: int, s: int) -> None:
        """Look up the values of the vector (2*group + half, s), ``group`` being (pair, x), and store them."""
        state = self._states(words, group, half, s)
        number = group[0] * 2 + group[1]
        kept = T.alloc_buffer((LANES,), "uint32", scope="local")
        T.buffer_store(kept, self._lookup_bytes(state, table) if self._byte_permutes else state, [lanes(0)])
        for e in range(4):
            slot = slot_k(number, half, e, s) if self.role == "k" else slot_v(group, half, e, s)
            if self._byte_permutes:
                moved = tir.reinterpret(f"int32x{LANES}", kept[lanes(0)]) << splat(24 - 8 * e, "int32")
                value = cast(moved >> splat(24, "int32"), "float32")
            else:
                value = table[cast(_shifted(kept[lanes(0)], 8 * e) & splat(STATES - 1, "uint32"), "int32")]
            T.buffer_store(out, value, [lanes(slot * LANES)])

    def _states(self, words: Any, group: tuple[Expr, int], half: int, s: int) -> Expr:
        """The states of the vector (2*group + half, s), as bytes."""
        pair, x = group
        number = pair * 2 + x
        here = words[self._place(number * 4 + half * 2 + s)]
        before = words[self._place(self._before(pair, x, half, s))]
        bits = self.section.bits
        state = here
        for back in range(1, -(-STATE_BITS // bits)):
            moved = self._moved(before, here, back) << splat(back * bits, "uint32")
            if (back + 1) * bits > STATE_BITS:
                moved = moved & splat((0xFF << back * bits & 0xFF) * 0x01010101, "uint32")
            state = state | moved
        return state

    def _before(self, pair: Expr, x: int, half: int, s: int) -> Expr:
        """Number of the vector of codes whose last dims are those before (2*group + half, s), around the ring."""
        sixteens = self.section.head_dim // 16
        if self.role == "k":
            p = pair * 4 + x * 2 + half
            return tir.Select(p % sixteens == 0, p + (sixteens - 1), p - 1) * 2 + s
        if s or half:
            return pair * 8 + (x * 4 + half * 2 + s - 1)
        return tir.Select(pair == 0, pair + (sixteens - 1), pair - 1) * 8 + (x * 4 + 3)

    def _moved(self, before: Expr, here: Expr, back: int) -> Expr:
        """The codes ``back`` dims before those of ``here``."""
        if self.role == "v":
            return pick([before, here], lambda k: LANES + k - 4 * back)
        # Sixteen dims are a row of sixteen bytes; rows are tokens.
        index = [k - back + (BYTES if k % 16 >= back else 16) for k in range(BYTES)]
        both = [as_bytes(before), as_bytes(here)]
        return as_words(tir.Shuffle(both, [tir.const(i, "int32") for i in index]))

    def _lookup_bytes(self, state: Expr, table: Any) -> Expr:
        """The table's values of 64 states, by byte permutes of 128 entries."""
        index = as_bytes(state)
        quarters = [table[tir.Ramp(BYTES * i, 1, BYTES)] for i in range(4)]
        low, high = (_bytes_intrinsic("vpermi2var.qi.512", quarters[i], index, quarters[i + 1]) for i in (0, 2))
        return as_words(tir.Select(index < tir.Broadcast(tir.const(0, "int8"), BYTES), high, low))


def _shifted(word: Expr, bits: int) -> Expr:
    return word >> splat(bits, "uint32") if bits else word


def _bytes_intrinsic(name: str, *arguments: Expr) -> Expr:
    return tir.call_llvm_pure_intrin(f"int8x{BYTES}", f"llvm.x86.avx512.{name}", *arguments)
