"""The decoder of a ``Drawn`` in float64 NumPy, reading past keys and values that it is given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .drawn_decoder import EPSILON, Drawn, Layer, rotary_tables

Past = Callable[[int, list[np.ndarray]], list[np.ndarray]]
"""(layer, the new keys and values [kv_heads, new, head_dim]) → the keys and values to attend to, the new ones last."""


class NumpyDecoder:
    """Runs one sequence at a time."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn = drawn
        self.weights = {name: value.astype(np.float64) for name, value in drawn.weights().items()}
        self.tables = [table.astype(np.float64) for table in rotary_tables(drawn.head_dim)]

    def logits(self, ids: np.ndarray, start: int, past: Past) -> np.ndarray:
        """Logits [vocab] after the last of the new ids [new], whose first is at position ``start``."""
        w, positions = self.weights, np.arange(start, start + len(ids))
        x = w["embed"][ids]
        if self.drawn.rotary == "none":
            x = x + w["places"][positions]
        for index, layer in enumerate(self.drawn.layers):
            x = x + self._attention(index, layer, norm(x, w[f"{index}.norm"]), positions, past)
            if f"{index}.gate" in w:
                x = x + self._mlp(index, norm(x, w[f"{index}.mlp_norm"]))
        return norm(x[-1], w["norm"]) @ w["head"]

    def _attention(self, index: int, layer: Layer, x: np.ndarray, positions: np.ndarray, past: Past) -> np.ndarray:
        q, k, v = (self._heads(f"{index}.{name}", x) for name in "qkv")
        if self.drawn.rotary != "none":
            q, k = (self._turned(y, positions) for y in (q, k))
        keys, values = (np.repeat(y, self.drawn.group, 0) for y in past(index, [k, v]))
        first = positions[-1] + 1 - keys.shape[1]
        scores = q @ keys.swapaxes(1, 2) * layer.scale
        scores = layer.softcap * np.tanh(scores / layer.softcap) if layer.softcap else scores
        distance = positions[:, None] - np.arange(first, positions[-1] + 1)
        scores = np.where((distance < 0) | (distance >= (layer.window or np.inf)), -np.inf, scores)
        chosen = np.exp(scores - scores.max(-1, keepdims=True))
        out = chosen / chosen.sum(-1, keepdims=True) @ values
        return out.swapaxes(0, 1).reshape(len(x), -1) @ self.weights[f"{index}.o"]

    def _heads(self, name: str, x: np.ndarray) -> np.ndarray:
        """[heads, new, head_dim]."""
        y = x @ self.weights[name] + self.weights.get(f"{name}_bias", 0.0)
        return y.reshape(len(x), -1, self.drawn.head_dim).swapaxes(0, 1)

    def _turned(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        cos, sin = (table[positions] for table in self.tables)
        half = self.drawn.head_dim // 2
        a, b = (x[..., :half], x[..., half:]) if self.drawn.rotary == "half" else (x[..., ::2], x[..., 1::2])
        parts = a * cos - b * sin, b * cos + a * sin
        if self.drawn.rotary == "half":
            return np.concatenate(parts, -1)
        return np.stack(parts, -1).reshape(x.shape)

    def _mlp(self, index: int, x: np.ndarray) -> np.ndarray:
        gate, up, down = (self.weights[f"{index}.{name}"] for name in ("gate", "up", "down"))
        return (x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """RMS norm."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight
