"""The ring of tiles of a layer with a sliding window: how much it holds, and what of a sequence can still be read.

Such a layer's cache is ``uint32 [batch, kv_head, ring_tiles, tile_bytes / 4]`` however long its sequences grow: tile
number n of a sequence stands in place n modulo the number of tiles. A token's number is its position, or behind the
sinks of a cache policy its position less these; tile n holds numbers 32 n … 32 n + 31. Every sequence of a batch is at
a place of its own, which follows from its length alone.

- **Size**: the blocks of the window and one more. A block is a tile; under a policy it is what the policy flushes at
  once. The block more is the one being filled: when its first token is written, its place gives up the block that stood
  there, the oldest. With it the window's tokens lie in the ring wherever in a block the newest of them stands.
- **Decode** appends and then attends: the window ends with the new token, and all of it is held.
- **Prefill** attends and then appends. The chunk's first row sees the window before it, so that nothing of the past
  may be overwritten before all rows have read it; the chunk's own tokens are read unquantized, not from the ring. So a
  chunk may be longer than the ring: of its tokens only those in the last ``tiles`` tiles are written, each place once.
- **A smaller capacity** makes an array of as many tiles as it needs, and no number wraps around.
- **Policies**: sinks and recent tokens lie in 16-bit rows as without a window. The sinks' rows are never given to other
  tokens, though nothing reads them once the window has passed; they are few. A flush writes its last blocks only, each
  place once; a block's centre stands at the block's number modulo theirs, so the tiles are whole blocks.
- **Crop**: what has been given up is gone. After a crop to n tokens the next one sees n - window + 1 … n, so the first
  of these must not lie before what the ring holds (``shortest``). The token of the last step can always be taken back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .cache_policy import NO_POLICY, TILE_TOKENS, CachePolicy, IntArray


@dataclass(frozen=True)
class WindowRing:
    """The ring of a layer whose tokens see the last ``window`` tokens, their own included."""

    window: int
    policy: CachePolicy = NO_POLICY

    @property
    def block(self) -> int:
        """Tokens that are given up together."""
        return max(TILE_TOKENS, self.policy.block)

    @property
    def tokens(self) -> int:
        """Tokens that the tiles hold."""
        return (-(-self.window // self.block) + 1) * self.block

    @property
    def tiles(self) -> int:
        """Tiles per sequence and kv head, at any capacity that needs as many."""
        return self.tokens // TILE_TOKENS

    def first_held(self, written: IntArray) -> IntArray:
        """Return the position of the first token in the tiles, int [batch], once ``written`` tokens went into them.

        Tokens in the 16-bit rows are held beside these; where nothing has been given up it is 0.
        """
        begun = -(-np.asarray(written) // self.block)
        given_up = np.maximum(begun * self.block - self.tokens, 0)
        return np.where(given_up > 0, given_up + self.policy.sinks, 0)

    def shortest(self, written: IntArray) -> IntArray:
        """Return the least length, int [batch], with which a sequence can go on whose tiles took ``written`` tokens.

        Lengths up to the sinks' number, 0 among them, are possible too: nothing of such a sequence is in tiles.
        """
        first = self.first_held(written)
        return np.where((first > 0) & (self.window > 1), first + self.window - 1, 0)
