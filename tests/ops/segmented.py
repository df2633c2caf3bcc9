"""A cache with a policy: its kernels run step by step, beside a plain record of what was appended."""

from __future__ import annotations

import numpy as np

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import TOKENS
from rotquant_tvm.formats.centre import centre_words, decode_centre
from rotquant_tvm.window_ring import WindowRing

from .reference import layout_of, random_words, unpack_words


class SegmentedCache:
    """Arrays of one layer, full of random bits at first, and the rotated keys and values that were appended.

    ``history``: float64 [batch, 2, kv_heads, capacity, head_dim], as 16-bit rows would hold them. With a ``window`` the
    tiles are a ring.
    """

    def __init__(
        self, kernels, rng, case, policy: CachePolicy, batch: int, capacity: int, dtype="float32", window=None
    ) -> None:
        self.kernels, self.rng, self.case, self.policy, self.dtype = kernels, rng, case, policy, dtype
        self.codecs = tuple(codec.in_rotated_basis() for codec in case.codecs)
        layout, tiles = layout_of(self.codecs), policy.packed_tiles(capacity)
        self.wraps = window is not None
        if self.wraps:
            tiles = min(tiles, WindowRing(window, policy).tiles)
        heads, head_dim = case.kv_heads, case.head_dim
        self.cache = random_words(rng, layout, (batch, heads, tiles))
        if any(codec.format.bits == 16 for codec in self.codecs):  # caches hold no NaN as a 16-bit value
            self.cache[:] = 0
        self.centre = None
        if policy.center:
            blocks = tiles * TOKENS // policy.center
            shape = (batch, heads, blocks, centre_words(head_dim))
            self.centre = rng.integers(0, 2**32, shape, dtype=np.uint32)
        slots = max(1, policy.sinks + policy.ring)
        self.plain = rng.standard_normal((batch, heads, 2, slots, head_dim)).astype(np.float16)
        self.packed, self.lengths = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
        self.history = np.zeros((batch, 2, heads, capacity, head_dim))

    @property
    def arrays(self) -> list[np.ndarray]:
        """The arrays that attention takes."""
        return [self.cache, *([] if self.centre is None else [self.centre]), self.plain, self.packed]

    def draw(self, seq: int) -> list[np.ndarray]:
        """Random new keys and values [batch, kv_heads, seq, head_dim]; keys stand off the origin."""
        shape = (len(self.lengths), self.case.kv_heads, seq, self.case.head_dim)
        offset = self.rng.standard_normal((1, self.case.kv_heads, 1, self.case.head_dim)) * 3
        keys, values = self.rng.standard_normal(shape) + offset, self.rng.standard_normal(shape)
        return [keys.astype(self.dtype), values.astype(self.dtype)]

    def append(self, new: list[np.ndarray], new_lengths: np.ndarray, chunk: bool = True) -> np.ndarray:
        """Run plan, flush and append; returns the tokens in tiles before."""
        build, run, policy = self.kernels.build, self.kernels.run, self.policy
        new_lengths = np.asarray(new_lengths, np.int32)
        self.lengths = self.lengths + new_lengths
        poison = np.full_like(self.packed, -7)
        plan = build(ops.plan_flush, policy, chunk=chunk)
        self.packed, before = run(plan, self.packed, self.lengths, poison, writes=(0, 2))
        kernel = build(ops.flush, *self.case.codecs, self.case.kv_heads, self.dtype, policy, wraps=self.wraps)
        written = [self.cache] if self.centre is None else [self.cache, self.centre]
        rest = [self.plain, *new, before, self.packed, self.lengths, new_lengths]
        result = run(kernel, *written, *rest, writes=tuple(range(len(written))))
        self.cache, self.centre = (result, None) if self.centre is None else result
        shape = (self.case.kv_heads, self.case.head_dim, self.cache.shape[-1], self.dtype, policy)
        rest = [*new, self.packed, self.lengths, new_lengths, self.cache]
        self.plain = run(build(ops.append_plain, *shape), self.plain, *rest, writes=(0,))
        for b, count in enumerate(new_lengths):
            stop = self.lengths[b]
            for role in range(2):
                rows = new[role][b, :, :count].astype(np.float16)
                self.history[b, role, :, stop - count : stop] = rows
        return before

    def crop(self, keep: int) -> None:
        """Forget the tokens after the first ``keep``."""
        self.lengths = np.minimum(self.lengths, keep).astype(np.int32)
        self.packed = np.clip(self.packed, 0, np.maximum(self.lengths - self.policy.sinks, 0)).astype(np.int32)

    def tiles(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Decoded K and V [batch, kv_heads, 32*tiles, head_dim], K with its centres, and the centres alone."""
        encoded = unpack_words(layout_of(self.codecs), self.cache)
        batch, heads, tiles = self.cache.shape[:3]
        flat = [
            codec.decode(e).reshape(batch, heads, tiles * TOKENS, -1)
            for codec, e in zip(self.codecs, encoded, strict=True)
        ]
        centres = np.zeros_like(flat[0])
        if self.centre is not None:
            with np.errstate(invalid="ignore", over="ignore"):  # unused centres hold random bits
                decoded = decode_centre(self.centre).astype(np.float64)
            centres = np.repeat(decoded, self.policy.center, axis=2)
        return [flat[0] + centres, flat[1]], centres

    def seen(self, packed: np.ndarray | None = None) -> np.ndarray:
        """What attention must see: as ``history``, decoded where ``packed`` (default: now) says so."""
        packed = self.packed if packed is None else packed
        result, (decoded, _) = self.history.copy(), self.tiles()
        sinks, held = self.policy.sinks, self.cache.shape[2] * TOKENS
        for b, count in enumerate(packed):
            places = np.arange(count) % held if self.wraps else np.arange(count)
            for role in range(2):
                result[b, role, :, sinks : sinks + count] = decoded[role][b][:, places]
        return result
