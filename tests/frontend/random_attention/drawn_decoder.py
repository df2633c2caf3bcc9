"""Decoders drawn at random: their attention, how a source spells it, what their cache is, and what is fed to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np

from rotquant_tvm.errors import FormatError
from rotquant_tvm.formats import parse_pair

VOCAB, WIDTH, INNER, POSITIONS, EPSILON, BASE = 29, 72, 40, 192, 1e-5, 100.0
"""Tokens, sizes of the residual stream and of the MLPs, positions at most, of the norms, of the rotary angles."""

SOURCES = {
    "torch": ("past", "past-bshd", "past-transposed", "written", "buffers", "none"),
    "program": ("past", "past-bshd", "written", "none"),
    "transformers": ("own",),
    "onnx-attention": ("past", "none"),
    "onnx-gqa": ("past", "past-shared"),
    "onnx-spelled": ("past", "past-bshd", "past-transposed", "none"),
    "onnx-exported": ("past",),
}
"""Where a model comes from, and how it keeps its cache."""

FORMATS = ["hurwitz3", "iso4/planar2", "f16", "rotor3/q8_0", "turbo3", "q4_0/hurwitz2", "turbo2.5", "q8_0/f16"]
FORMATS += ["planar3", "hurwitz4:ip/dense3", "iso3-full", "bf16/turbo4", "hurwitz2+tcq", "rq3", "q8_0"]
LAYER_FORMATS = ["", "", "0=f16", "0=iso3/planar4", "-1=q8_0"]
MASKS, SCORES = ["positions", "padding", "given", "given-bool"], ["sdpa", "matmul", "einsum", "bmm"]
REPEATS = ["expand", "interleave", "take", "grouped"]
POLICIES = ["", "sinks=3,recent=5,center=32", "sinks=4", "recent=9", "center=64,defer=40", "sinks=2,recent=1,defer=33"]


@dataclass(frozen=True)
class Layer:
    """One attention; ``window`` and ``softcap`` are None where there are none."""

    window: int | None
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class Drawn:
    """A decoder and its use.

    ``rotary``: "half" (dimensions a half apart), "pairs" (neighbours) or "none" (learned positions). ``mask``,
    ``scores`` and ``repeat`` are spellings of whichever source has a choice. ``formats`` and ``layer_formats`` as of
    ``KVCacheConfig.parse``. ``calls``: how many new tokens each sequence gets, call by call; all of them 1 or 0 is a
    decode step.
    """

    source: str
    cache: str
    kv_heads: int
    group: int
    head_dim: int
    layers: tuple[Layer, ...]
    rotary: str
    packed: bool
    biased: bool
    repeat: str
    mask: str
    scores: str
    scale_at: str
    formats: str
    layer_formats: str
    calls: tuple[tuple[int, ...], ...]
    seed: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.calls[0])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(np.sum(self.calls, 0).max())

    def weights(self) -> dict[str, np.ndarray]:
        """The weights by name, float32; matrices are [in, out]."""
        rng = np.random.default_rng(self.seed)
        normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        weights = {"embed": normal(VOCAB, WIDTH), "norm": 1 + 0.2 * normal(WIDTH), "head": 0.2 * normal(WIDTH, VOCAB)}
        if self.rotary == "none":
            weights["places"] = normal(POSITIONS, WIDTH)
        if self.source == "transformers":
            for index in range(len(self.layers)):
                weights[f"{index}.mlp_norm"] = 1 + 0.2 * normal(WIDTH)
                for name, shape in (("gate", (WIDTH, INNER)), ("up", (WIDTH, INNER)), ("down", (INNER, WIDTH))):
                    weights[f"{index}.{name}"] = 0.15 * normal(*shape)
        for index in range(len(self.layers)):
            weights[f"{index}.norm"] = 1 + 0.2 * normal(WIDTH)
            for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                weights[f"{index}.{name}"] = 0.2 * normal(WIDTH, heads * self.head_dim)
                if self.biased:
                    weights[f"{index}.{name}_bias"] = 0.3 * normal(heads * self.head_dim)
            weights[f"{index}.o"] = 0.2 * normal(self.heads * self.head_dim, WIDTH)
        return {name: value.astype(np.float32) for name, value in weights.items()}


def rotary_tables(head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines float32 [positions, head_dim / 2]."""
    frequencies = BASE ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(POSITIONS)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def drawn_decoder(seed: int) -> Drawn:
    """Draw a decoder that its source can spell."""
    random = Random(seed)
    one = random.choice
    source = one(list(SOURCES))
    cache = one(SOURCES[source])
    head_dim, count, batch = one([32, 32, 48, 64, 80, 96, 128]), one([1, 1, 2]), one([1, 2, 3])
    mask, scores = one(MASKS), one(SCORES)
    layers = [_layer(one, head_dim) for _ in range(count)]
    drawn = Drawn(
        source,
        cache,
        one([1, 2, 3]),
        one([1, 2, 3, 4]),
        head_dim,
        tuple(layers),
        one(["half", "pairs", "none"]),
        packed=one([False, True]),
        biased=one([False, True]),
        repeat=one(REPEATS),
        mask=mask,
        scores=scores,
        scale_at=one(["scores", "query", "both"]),
        formats=_formats(one([text for text in FORMATS if _takes(text, head_dim)]), one(POLICIES)),
        layer_formats=one([text for text in LAYER_FORMATS if _takes(text.partition("=")[2] or "f16", head_dim)]),
        calls=_calls(random, batch),
        seed=seed,
    )
    return _possible(drawn)


def _layer(one: Any, head_dim: int) -> Layer:
    scale = one([1 / math.sqrt(head_dim), 0.3, 0.05])
    return Layer(one([None, None, 33, 7, 1, 64, 20]), scale, one([None, 3.0, 1.5]))


def _possible(drawn: Drawn) -> Drawn:
    """The drawn decoder without what its source has no word for."""
    first = drawn.layers[0]
    if drawn.source == "transformers":
        layers = [Layer(first.window, 1 / math.sqrt(drawn.head_dim), None)] * len(drawn.layers)
        drawn = replace(drawn, rotary="half", mask="padding", layers=tuple(layers))
    if drawn.source == "onnx-gqa":
        drawn = replace(drawn, mask="padding")
    elif drawn.cache in ("none", "buffers", "written"):
        drawn = replace(drawn, mask="positions")
    if drawn.mask.startswith("given"):  # which is taken for causal
        drawn = replace(drawn, layers=tuple(replace(layer, window=None) for layer in drawn.layers))
    if drawn.source in ("torch", "program", "onnx-exported") and drawn.scores == "sdpa":
        drawn = replace(drawn, layers=tuple(replace(layer, softcap=None) for layer in drawn.layers))
    return drawn


def _takes(formats: str, head_dim: int) -> bool:
    """Whether keys and values of a head dimension can have formats."""
    try:
        for found in parse_pair(formats):
            found.check(head_dim)
    except FormatError:
        return False
    return True


def _formats(formats: str, policy: str) -> str:
    """Formats and policy as one text; a preset brings its own."""
    return formats if formats == "rq3" else ",".join(filter(None, (formats, policy)))


def _calls(random: Random, batch: int) -> tuple[tuple[int, ...], ...]:
    """A chunk, steps, a ragged chunk in which some may get nothing, and steps of all or of some."""

    def counts(choices: Sequence[int]) -> tuple[int, ...]:
        drawn = [random.choice(choices) for _ in range(batch)]
        return tuple(drawn) if any(drawn) else (1,) * batch

    every = (1,) * batch
    calls = [counts(range(1, 46)), *[every] * random.choice([0, 2, 5])]
    calls += [counts([0, 1, 5, 32, 40]), *[every] * random.choice([0, 1, 9])]
    return tuple([*calls, *(counts([0, 1]) for _ in range(random.choice([0, 3]))), counts([2, 70])])
