"""A conversation on a compiled model, and the same in torch over the codes that the compiled cache stored.

Two sequences of different lengths are prefilled in two chunks and decoded token by token. In torch each is run alone,
without padding, its cache holding what the session's holds: in a chunk the new tokens see each other as they are, in
decode a token sees even itself quantized.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from rotquant_tvm.kv_cache_config import KVCacheConfig

from ..stored_codes import off_boundary, stored
from .architectures import VOCAB

CHUNKS, DECODED = ((37, 21), (18, 30)), 40
"""New tokens of each row in each prefill, then decode steps; both rows cross windows and tiles."""


@dataclass
class Turn:
    """One call of a session: the new ids of each row, the logits after them, and per layer and row the new codes."""

    ids: list[np.ndarray]
    starts: np.ndarray
    decode: bool
    logits: np.ndarray
    codes: list[list[list]] = field(default_factory=list)


def converse(session, config: KVCacheConfig, head_dim: int, decoded: int = DECODED) -> list[Turn]:
    """Run the conversation on a session of two sequences and keep what each call stored."""
    rng = np.random.default_rng(5)
    layers = len(session.cache.layers)
    turns = []
    for counts in (*CHUNKS, *((1, 1),) * decoded):
        ids = [rng.integers(3, VOCAB, count).astype(np.int32) for count in counts]
        starts, decode = session.lengths, counts == (1, 1)
        logits = session.decode(np.concatenate(ids)) if decode else session.prefill(ids)
        turn = Turn(ids, starts, decode, logits)
        for layer in range(layers):
            codecs = config.codecs(layer, layers, head_dim)
            spans = zip(starts, session.lengths, strict=True)
            turn.codes.append([stored(session, layer, codecs, *span, row=row) for row, span in enumerate(spans)])
        turns.append(turn)
    return turns


class StoredCache(DynamicCache):
    """torch's cache of one row, whose entries are those of a session.

    ``differences`` collects (codes that torch chooses otherwise, how far those values are from a boundary), over the
    tokens that a layer with ``windows`` still sees afterwards.
    """

    def __init__(self, config: KVCacheConfig, windows: tuple[int | None, ...]) -> None:
        super().__init__()
        self.config, self.windows, self.turn, self.row = config, windows, None, 0
        self.differences: list[tuple[int, float]] = []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Append what the session stored; a chunk's own tokens are given back as they are."""
        new = [x.float().numpy() for x in (key_states, value_states)]
        codecs = self.config.codecs(layer_idx, len(self.windows), new[0].shape[-1])
        seen = slice(-(self.windows[layer_idx] or 0), None)
        decoded = []
        for codec, x, theirs in zip(codecs, new, self.turn.codes[layer_idx][self.row], strict=True):
            mine = codec.encode(x, np.float32)
            parts = [type(e)(e.codes[:, :, seen], e.gain[:, :, seen]) for e in (mine, theirs)]
            self.differences.append(off_boundary(codec, x[:, :, seen], *parts))
            decoded.append(torch.from_numpy(codec.decode(theirs).astype(np.float32)).to(key_states.dtype))
        whole = super().update(*decoded, layer_idx, *args, **kwargs)
        if self.turn.decode:
            return whole
        count = key_states.shape[2]
        return tuple(
            torch.cat([x[:, :, :-count], raw], 2) for x, raw in zip(whole, (key_states, value_states), strict=True)
        )


def replay(model, turns: list[Turn], config: KVCacheConfig, windows) -> tuple[list[np.ndarray], int, float]:
    """Torch's logits of every turn [batch, vocab], how many codes differ, and their largest distance."""
    results = [np.zeros_like(turn.logits) for turn in turns]
    count, furthest = 0, 0.0
    for row in range(2):
        cache = StoredCache(config, windows)
        cache.row = row
        for turn, result in zip(turns, results, strict=True):
            cache.turn = turn
            ids = torch.from_numpy(turn.ids[row][None]).long()
            positions = torch.arange(ids.shape[1])[None] + int(turn.starts[row])
            with torch.no_grad():
                output = model(ids, position_ids=positions, past_key_values=cache, use_cache=True)
            result[row] = output.logits[0, -1].float().numpy()
        count += sum(number for number, _ in cache.differences)
        furthest = max(furthest, *(distance for _, distance in cache.differences))
    return results, count, furthest


def padded_logits(model, rows: list[np.ndarray], side: str) -> np.ndarray:
    """Logits of torch after the last token of each row of one batch, padded on a side and masked."""
    longest = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        here = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, here], mask[index, here] = row, 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    arguments = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        logits = model(torch.from_numpy(ids), **{k: torch.from_numpy(v) for k, v in arguments.items()}).logits
    last = [longest - 1 if side == "left" else len(row) - 1 for row in rows]
    return logits[torch.arange(len(rows)), last].float().numpy()
