"""Append of one token per sequence on CUDA: a warp per key or value, as few steps in a row as possible.

Behind a rotation the warp holds the vector as ``vector_core_cuda`` does, and hands its codes to the lanes that a tile
wants them in; their words are read, since other tokens share them, while the vector is being encoded. Formats without a
rotation go the way of whole tiles, of which one token is written.
"""

from __future__ import annotations

from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS, Codec, TileLayout
from rotquant_tvm.ops.codec_shape import CodecShape
from rotquant_tvm.ops.tile_access import gain_position

from .cuda_ops import WARP, Registers, i32, load_words, prmt, ptx, scalar, store_words, u32, warp_sync
from .dependent_launch_cuda import let_next_start, wait_for_inputs
from .opaque_cuda import again
from .tile_encoder_cuda import TileEncoder
from .tile_lane_cuda import Lane
from .tile_pack_cuda import TileStores
from .tile_rotation_cuda import TileRotation
from .tile_rows_cuda import ROWS, HalfTileRows, brain2, commit_copies, wait_for_copies
from .vector_core_cuda import VectorCore
from .vector_lanes_cuda import VectorLanes

Expr = Any
LINE = 128
"""Bytes that a prefetch brings."""


class TokenAppend:
    """The launch for one new token per sequence; ``codecs`` are K's and V's."""

    def __init__(
        self, layout: TileLayout, codecs: tuple[Codec, Codec], dtype: str, starts_early: bool = False
    ) -> None:
        """Plan it, emitting nothing; ``starts_early``: see ``dependent_launch_cuda``."""
        self.layout, self.codecs, self.dtype, self.starts_early = layout, codecs, dtype, starts_early
        access = "float32" if dtype == "float32" else "float16"
        self.lanes = VectorLanes.choose(layout.head_dim, access, elements=4)
        self.shapes = [CodecShape.describe(codec, access) for codec in codecs]

    @property
    def possible(self) -> bool:
        """Whether both roles have a way."""
        pairs = zip(self.codecs, self.shapes, strict=True)
        return all(codec.rotation.identity or VectorCore.possible(shape, self.lanes) for codec, shape in pairs)

    def launch(self, cache: Any, source: list[Any], coefficients: list[Any], lengths: tuple[Any, Any]) -> None:
        """Emit the launch."""
        batch, kv_heads, _, _ = source[0].shape
        with T.launch_thread("blockIdx.x", batch * kv_heads * 2) as block:
            with T.launch_thread("threadIdx.x", WARP) as thread:
                let_next_start(self.starts_early)
                block, lane = scalar(i32(block)), scalar(i32(thread))
                b, head = scalar(block // (2 * i32(kv_heads))), scalar(block // 2 % i32(kv_heads))
                with T.If(block % 2 == 0):
                    for role, frame in enumerate((T.Then, T.Else)):
                        with frame():
                            self._role(role, cache, (b, head, lane), (source[role], coefficients[role]), lengths)

    def _role(
        self, role: int, cache: Any, where: tuple[Expr, Expr, Expr], given: tuple[Any, Any], lengths: tuple[Any, Any]
    ) -> None:
        """The key or the value of a sequence and a head."""
        lane = where[2]
        x, coefficients = given
        core = None if self.codecs[role].rotation.identity else VectorCore(self.shapes[role], self.lanes, codes=True)
        if core is not None:
            core.place(lane)
            core.load(coefficients, lane, 1)  # weights, which nobody writes
        if not self.starts_early:
            self._append(role, self._place(cache, where, lengths), x, core)
            return
        self._bring_nearer(role, cache, where, lengths[0])
        if core is None:
            wait_for_inputs()
            self._append(role, self._place(cache, where, lengths), x, core)
            return
        # What follows the wait is long and runs once, after other kernels have had the instruction cache: going through
        # it beforehand, with nothing, brings its instructions. The compiler must not make two copies of it.
        with T.serial(0, again(i32(2))) as turn:
            real = scalar(turn > 0, "bool")
            with T.If(real), T.Then():
                wait_for_inputs()
            self._append(role, self._place(cache, where, lengths, real), x, core)
            warp_sync()  # the codes' place is written again

    def _place(self, cache: Any, where: tuple[Expr, Expr, Expr], lengths: tuple[Any, Any], real: Expr = True) -> _Place:
        """Where the token goes; nowhere, and nothing is read, unless ``real``."""
        b, head, lane = where
        counts = Registers(2, "int32")
        counts.fill(i32(0))
        with T.If(real), T.Then():
            for n, array in enumerate(lengths):
                load_words(counts, n, array, [b], 1, "global")
        position, count = scalar(counts[0] - 1), counts[1]
        tile = scalar(position // TOKENS)
        place = (b.astype("int64"), head.astype("int64"), tile.astype("int64"))
        new = scalar(tir.all(count > 0, place[2] < cache.shape[2]).astype("int32"))
        return _Place(cache, place, scalar(position % TOKENS), new, lane, real)

    def _append(self, role: int, at: _Place, x: Any, core: VectorCore | None) -> None:
        if core is None:
            self._through_tile(role, at, x)
        else:
            self._through_vector(role, at, x, core)

    def _bring_nearer(self, role: int, cache: Any, where: tuple[Expr, Expr, Expr], lengths: Any) -> None:
        """Ask for the tile that the token goes to, by what may be the length of a step ago: a hint, and not more.

        Past the L1 cache, which would keep the old length. A large cache's tile comes from memory, through an address
        that no table of the multiprocessor holds.
        """
        b, head, lane = where
        length = Registers(1, "int32")
        load_words(length, 0, lengths, [b], 1, "global.cg")
        last = tir.min((tir.max(length[0], i32(1)) - 1).astype("int64") // TOKENS, cache.shape[2] - 1)
        sections = [self.layout.sections[f"{'kv'[role]}_{name}"] for name in ("codes", "gains")]
        for section in sections:
            lines = -(-section.nbytes // LINE)
            for first in range(0, lines, WARP):
                word = scalar((section.offset + (first + lane) * LINE) // 4)
                with T.If(tir.all(first + lane < lines, cache.shape[2] > 0)), T.Then():
                    ptx("prefetch.global.L2", cache.ptr_to([b.astype("int64"), head.astype("int64"), last, word]))

    def _through_tile(self, role: int, at: _Place, x: Any) -> None:
        rotation = TileRotation(self.codecs[role], self.dtype, "kv"[role])
        encoder = TileEncoder(at.cache, self.layout, self.codecs[role], rotation, at.lane)
        shared = T.alloc_buffer((HalfTileRows.halves(self.layout.head_dim, self.dtype),), "uint16", scope="shared")
        rows = HalfTileRows(shared, self.layout.head_dim, self.dtype, i32(0), at.lane)

        def source(_row: Expr, element: Expr) -> tuple[Any, list[Expr]]:
            return x, [*at.place[:2], 0, element]

        row = scalar(at.token % ROWS)
        rows.copy_some(source, row, row + 1)
        commit_copies()
        wait_for_copies(0)
        with T.If(at.new != 0), T.Then():
            encoder.encode(at.place, (at.token, scalar(at.token + 1)), lambda _half: rows, lambda _half: None)

    def _through_vector(self, role: int, at: _Place, x: Any, core: VectorCore) -> None:
        raw = self.lanes.raw()
        raw.fill(u32(0))
        with T.If(at.real), T.Then():
            self.lanes.load(raw, x, [*at.place[:2], 0], core.lane, "global")
        stores = TileStores(at.cache, self.layout, Lane("kv"[role], self.layout.head_dim, at.lane))
        writer = _TokenWriter(stores, at)
        (encoded,) = core.encode([self._unpack(raw)])
        writer.write(core, encoded.values, encoded.gain)

    def _unpack(self, raw: Registers) -> Registers:
        if self.dtype != "bfloat16":
            return self.lanes.unpack(raw)
        x = Registers(self.lanes.elements, "float32")
        for number, word in enumerate(raw):
            x[2 * number], x[2 * number + 1] = brain2(word)
        return x


class _Place:
    """Where a warp's token goes: ``place`` is (sequence, head, tile), ``new`` says whether there is one at all.

    ``real``: whether its elements may be read yet.
    """

    def __init__(
        self, cache: Any, place: tuple[Expr, Expr, Expr], token: Expr, new: Expr, lane: Expr, real: Expr
    ) -> None:
        self.cache, self.place, self.token, self.new, self.lane, self.real = cache, place, token, new, lane, real


class _TokenWriter:
    """Puts one token's codes and gain among those of its tile, which are read as soon as this is created."""

    def __init__(self, stores: TileStores, at: _Place) -> None:
        self.stores, self.at, self.role = stores, at, stores.order.role
        token, lane = at.token, at.lane
        bits = stores.order.head_dim * stores.format.bits
        mine = lane // 4 == token % 8 if self.role == "k" else lane % 4 == token % 8 // 2
        self.mine = scalar(tir.all(at.new != 0, mine).astype("int32"))
        # A half-word is put together with the neighbouring lane's, so that all lanes take part.
        self.active = at.new if bits % 32 else self.mine
        half = gain_position(token)
        self.gain_word = [*at.place, stores.first_gain + half // 2]
        self.gain_shift = scalar(u32(half % 2 * 16))
        self.old_gain = Registers(1)
        self.old = Registers(-(-bits // 32))
        with T.If(self.active != 0), T.Then():
            read = stores.read_codes(at.place)
            for index, word in enumerate(read):
                self.old[index] = word
            load_words(self.old_gain, 0, at.cache, self.gain_word, 1, "global")

    def write(self, core: VectorCore, values: Registers, gain: Expr) -> None:
        """Write the vector of a ``VectorCore``."""
        words = self._exchange(core, values)
        order, token = self.stores.order, self.at.token
        bits = tir.reinterpret("uint16", gain.astype("float16")).astype("uint32")
        halves = [self._half(words, half) for half in range(2)]
        with T.If(self.active != 0), T.Then():
            self.stores.codes(self.at.place, halves, lambda other: other == token, self.old)
        first = order.lane % 4 == 0 if self.role == "k" else order.lane < 4
        with T.If(tir.all(self.mine != 0, first)), T.Then():
            kept = self.old_gain[0] & ~(u32(0xFFFF) << self.gain_shift)
            store_words(self.at.cache, self.gain_word, [scalar(kept | bits << self.gain_shift)])

    def _exchange(self, core: VectorCore, values: Registers) -> list[Expr]:
        """The codes as the lane's tile wants them: per 16 dims a word of four bytes, or one for each of two dims."""
        lanes, order = core.lanes, self.stores.order
        shared = T.alloc_buffer((order.head_dim // 4,), "uint32", scope="shared")
        with T.If(core.group == 0), T.Then():
            for chunk in range(lanes.chunks):
                first = chunk * lanes.access
                words = []
                for k in range(first, first + lanes.access, 4):
                    low, high = (prmt(values[j], values[j + 1], u32(0x0040)) for j in (k, k + 2))
                    words.append(prmt(low, high, u32(0x5410)))
                at = [lanes.dim(core.lane, first) // 4]
                lanes.when_active(core.lane, chunk, lambda w=words, at=at: store_words(shared, at, w, "shared"))
        warp_sync()
        found = Registers(2 * order.blocks)
        g, t = order.lane // 4, order.lane % 4
        for k in range(order.blocks):
            if self.role == "k":
                load_words(found, k, shared, [4 * k + t], 1, "shared")
                continue
            for r in range(2):
                load_words(found, 2 * k + r, shared, [4 * k + 2 * r + g // 4], 1, "shared")
                found[2 * k + r] = found[2 * k + r] >> u32(g % 4 * 8) & u32(0xFF)
        return list(found)

    def _half(self, words: list[Expr], half: int) -> list[Expr]:
        """The groups of half a tile with the token's codes, and zeros elsewhere."""
        order, token = self.stores.order, self.at.token
        if self.role == "k":
            rows = [scalar(tir.Select(half * 16 + order.token(r) == token, u32(0xFFFF), u32(0))) for r in range(2)]
            nibbles = [_nibbles_of(words[k]) for k in range(order.blocks)]
            parts = [nibbles[k] & rows[r] for k, r in map(order.place, range(2 * order.blocks))]
        else:
            here = scalar(tir.Select(token // 16 == half, u32(0xF), u32(0)))
            shift = scalar(u32((token % 16 // 8 * 2 + token % 2) * 4))
            parts = [(words[2 * k + r] & here) << shift for k, r in map(order.place, range(2 * order.blocks))]
        return [scalar(low | high << u32(16)) for low, high in zip(parts[::2], parts[1::2], strict=True)]


def _nibbles_of(word: Expr) -> Expr:
    """Four bytes below 16 as four nibbles."""
    pairs = scalar((word | word >> u32(4)) & u32(0x00FF00FF))
    return scalar((pairs | pairs >> u32(8)) & u32(0xFFFF))
