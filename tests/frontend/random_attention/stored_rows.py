"""What a session's cache holds of each sequence: keys and values as attention reads them, and how they must be stored.

Attention over these is what the compiled model computes, so that logits can be compared to rounding, and what is stored
is compared by itself with the exact keys and values (``tests/stored_codes`` says why).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import GAIN_RULES, TOKENS, Codec, EncodedKV, TileLayout
from rotquant_tvm.formats.centre import decode_centre

EXACT = 2e-5
"""Of the largest element: how far the compiled model's keys and values are from those in float64."""
HALF = 2.0**-11
"""How far rounding to 16 bits moves an element, relative to it."""


@dataclass(frozen=True)
class LayerArrays:
    """A copy of one layer's arrays and counts after a call; ``codecs`` are those of K and V."""

    codecs: tuple[Codec, Codec]
    policy: CachePolicy
    tiles: np.ndarray
    centres: np.ndarray | None
    plain: np.ndarray | None
    lengths: np.ndarray
    packed: np.ndarray

    def in_tiles(self, row: int, position: int) -> bool:
        """Whether a token is in tiles rather than in 16-bit rows."""
        return not self.policy.segmented or 0 <= position - self.policy.sinks < self.packed[row]

    def encoded(self, row: int, positions: np.ndarray) -> list[EncodedKV]:
        """Codes and gains [kv_heads, n, …] of tokens in tiles."""
        k, v = self.codecs
        heads, tiles = self.tiles.shape[1:3]
        layout = TileLayout(k.format, v.format, k.head_dim)
        words = self.tiles[row].view(np.uint8).reshape(heads, tiles, layout.tile_bytes)
        places = (positions - self.policy.sinks * self.policy.segmented) % (tiles * TOKENS)
        flat = [
            (e.codes.reshape(heads, tiles * TOKENS, -1), e.gain.reshape(heads, tiles * TOKENS, -1))
            for e in layout.unpack(words)
        ]
        return [EncodedKV(codes[:, places], gain[:, places]) for codes, gain in flat]

    def centre(self, row: int, positions: np.ndarray) -> np.ndarray:
        """Centres [kv_heads, n, head_dim] of tokens in tiles, rotated."""
        if self.centres is None:
            return np.zeros((self.tiles.shape[1], len(positions), self.codecs[0].head_dim))
        blocks = (positions - self.policy.sinks) // self.policy.center % self.centres.shape[2]
        return decode_centre(self.centres[row][:, blocks]).astype(np.float64)

    def rows(self, row: int, positions: np.ndarray) -> np.ndarray:
        """16-bit rows [2, kv_heads, n, head_dim] of tokens that are not in tiles, rotated."""
        sinks, ring = self.policy.sinks, max(1, self.policy.ring)
        slots = np.where(positions < sinks, positions, sinks + (positions - sinks) % ring)
        assert self.plain is not None
        return self.plain[row][:, :, slots].swapaxes(0, 1).astype(np.float64)

    def read(self, row: int, first: int, stop: int) -> list[np.ndarray]:
        """Keys and values float64 [kv_heads, stop - first, head_dim]."""
        positions = np.arange(first, stop)
        tiled = np.array([self.in_tiles(row, position) for position in positions], bool)
        results = []
        for role, codec in enumerate(self.codecs):
            rotated = np.zeros((self.tiles.shape[1], len(positions), codec.head_dim))
            if tiled.any():
                rotated[:, tiled] = codec.decode_rotated(self.encoded(row, positions[tiled])[role])
                if role == 0:
                    rotated[:, tiled] += self.centre(row, positions[tiled])
            if not tiled.all():
                rotated[:, ~tiled] = self.rows(row, positions[~tiled])[role]
            results.append(codec.unrotate(rotated))
        return results

    def check(self, row: int, before: LayerArrays, exact: list[np.ndarray], first: int) -> None:
        """Assert that tokens from ``first`` on are stored as they must be, those that this call moved or brought.

        ``exact``: the keys and values [kv_heads, length, head_dim] of all tokens.
        """
        positions = np.arange(first, self.lengths[row])
        tiled = np.array([self.in_tiles(row, p) for p in positions], bool)
        moved = np.array([p >= before.lengths[row] or not before.in_tiles(row, p) for p in positions], bool)
        at, kept = positions[tiled & moved], positions[~tiled]
        for role, codec in enumerate(self.codecs):
            if len(at):
                rotated = codec.rotate(exact[role][:, at])
                size = np.abs(rotated).max()
                # Tokens that waited in the ring were rounded there.
                slack = (EXACT + (HALF if self.policy.segmented else 0.0)) * size
                rest = rotated - self.centre(row, at) if role == 0 else rotated
                check_codes(codec, rest, self.encoded(row, at)[role], slack)
            if len(kept):
                rotated = codec.rotate(exact[role][:, kept])
                error = np.abs(self.rows(row, kept)[role] - rotated)
                assert (error <= HALF * np.abs(rotated) + EXACT * np.abs(rotated).max()).all(), error.max()


def check_codes(codec: Codec, y: np.ndarray, encoded: EncodedKV, slack: float) -> None:
    """Assert that rotated vectors y [..., d], known to ``slack``, have the codes and gains that their format says."""
    gain = encoded.gain.astype(np.float64)
    if codec.format.bits == 16:
        error = np.abs(codec.decode_rotated(encoded) - y)
        limit = 2.0**-8 if codec.format.codebook == "bfloat16" else HALF
        assert (error <= limit * np.abs(y) + slack).all(), error.max()
    elif codec.format.codebook == "linear":
        steps = np.repeat(np.abs(gain), 32, -1)[..., : y.shape[-1]]
        blocks = np.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, -y.shape[-1] % 32)]).reshape(*gain.shape, 32)
        parts = 127 if codec.format.bits == 8 else 8
        assert (np.abs(np.abs(gain) * parts - np.abs(blocks).max(-1)) <= HALF * np.abs(blocks).max(-1) + slack).all()
        error = np.abs(codec.decode_rotated(encoded) - y)
        reach = 0.5 if codec.format.bits == 8 else np.where(np.abs(y) > 6.9 * steps, 1.0, 0.5)  # the far end saturates
        assert (error <= reach * steps * (1 + 1e-3) + HALF * np.abs(y) + slack).all(), error.max()
    else:
        assert codec.codebook is not None
        norm = np.linalg.norm(y, axis=-1, keepdims=True)
        exact = codec.in_rotated_basis().encode(y)
        unit, mine, theirs = y / norm, codec.codebook.decode(exact.codes), codec.codebook.decode(encoded.codes)
        if codec.format.codebook == "trellis":
            least, found = (((unit - x) ** 2).sum(-1) for x in (mine, theirs))
            assert (found <= 1.5 * least + 1e-3).all() and found.mean() <= 1.02 * least.mean() + 1e-3
        else:
            farther = np.abs(unit - theirs) - np.abs(unit - mine)
            assert (farther <= 2.5 * slack / norm).all(), (farther * norm / slack).max()
        gains = GAIN_RULES[codec.format.gain](norm[..., 0], y, theirs)
        assert (np.abs(gain[..., 0] - gains) <= 2 * HALF * gains + 3 * slack).all(), np.abs(gain[..., 0] - gains).max()


def layer_arrays(session, config, head_dim: int) -> list[LayerArrays]:
    """Copies of what a session holds, layer by layer."""
    count, cache = len(session.info.layers), session.cache
    arrays = iter([tensor.numpy().copy() for tensor in cache.layers])
    lengths, packed = cache.device_lengths(), cache.tensors[-2].numpy().copy() if cache.policy.segmented else None
    result = []
    for index in range(count):
        policy = config.layer_policy(index, count)
        tiles = next(arrays)
        centres = next(arrays) if policy.center else None
        plain = next(arrays) if policy.segmented else None
        counts = lengths if packed is None or not policy.segmented else packed
        result.append(
            LayerArrays(config.codecs(index, count, head_dim), policy, tiles, centres, plain, lengths.copy(), counts)
        )
    return result
