"""The codes that a session's cache holds, and whether others would have chosen the same.

A difference in the last bit of float32 moves a key or value across a quantization boundary now and then, and from then
on two runs drift apart. So references take the codes from the compiled cache, and tests check separately that the
reference would have chosen the same code or stood on the boundary.
"""

from __future__ import annotations

import numpy as np

from rotquant_tvm.formats import TOKENS, Codec, EncodedKV, TileLayout


def stored(session, layer: int, codecs: tuple[Codec, Codec], start: int, stop: int, row: int = 0) -> list[EncodedKV]:
    """Codes and gains of a layer's keys and values at positions start … stop-1, [1, kv_heads, tokens, …].

    A layer that holds fewer tiles than that is a ring of them.
    """
    words = session.cache.layers[layer].numpy()[row : row + 1]
    layout = TileLayout(codecs[0].format, codecs[1].format, codecs[0].head_dim)
    slots = np.arange(start, stop) % (words.shape[2] * TOKENS)
    result = []
    for encoded in layout.unpack(words.view(np.uint8).reshape(*words.shape[:3], layout.tile_bytes)):
        shape = (*words.shape[:2], words.shape[2] * TOKENS, -1)
        gain = encoded.gain.reshape(*shape[:3], encoded.gain.shape[-1])
        result.append(EncodedKV(encoded.codes.reshape(shape)[:, :, slots], gain[:, :, slots]))
    return result


def off_boundary(codec: Codec, x: np.ndarray, mine: EncodedKV, theirs: EncodedKV) -> tuple[int, float]:
    """(how many codes differ, the largest distance of such an element from the boundary between the two codes).

    Distances are relative to the vector's largest element, in the rotated basis.
    """
    gains = 0.0
    if codec.format.codebook == "linear":
        gains, mine = _with_their_gain(x, mine, theirs)
    different = mine.codes != theirs.codes
    if not different.any():
        return 0, gains
    y = codec.rotate(x.astype(np.float64))
    if codec.codebook is not None:
        norm = np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
        distance = np.abs(y[..., None] - norm[..., None] * codec.codebook.boundaries).min(-1)
    else:
        a, b = codec.decode_rotated(mine), codec.decode_rotated(theirs)
        distance = np.abs(np.abs(y - a) - np.abs(y - b)) / 2
    largest = np.abs(y).max(-1, keepdims=True)
    return int(different.sum()), max(gains, float((distance / largest)[different].max()))


def _with_their_gain(x: np.ndarray, mine: EncodedKV, theirs: EncodedKV) -> tuple[float, EncodedKV]:
    """q8_0's gain is rounded before its codes: (how far such a rounding was from its boundary, codes by their gain)."""
    blocks = np.abs(x.astype(np.float64)).reshape(*x.shape[:-1], -1, 32).max(-1) / 127
    middle = (mine.gain.astype(np.float64) + theirs.gain.astype(np.float64)) / 2
    different = mine.gain != theirs.gain
    furthest = float((np.abs(blocks - middle) / blocks)[different].max(initial=0))
    scale = np.repeat(theirs.gain.astype(np.float32), 32, axis=-1)
    codes = np.clip(np.rint(x / scale), -127, 127).astype(np.int8).view(np.uint8)
    return furthest, EncodedKV(codes, theirs.gain)
