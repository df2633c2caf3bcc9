"""Arguments to measure kernels with: full caches with valid gains, lengths that fit them, vectors of normal numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cache_policy import CachePolicy
from ..formats import TOKENS, KeyLayout, KVFormat, TileLayout
from .kernel_shape import KernelShape

RESULTS: dict[str, tuple[str, ...]] = {
    "attention_decode": ("out",),
    "attention_prefill": ("out",),
    "append": ("cache",),
    "append_plain": ("plain",),
    "flush": ("cache", "centre"),
    "roundtrip": ("y",),
    "rotate": ("y",),
    "quantize": ("codes", "gain"),
    "dequantize": ("y",),
    "query_features": ("features",),
    "score": ("out",),
    "dequantize_cache": ("k", "v"),
    "dequantize_segments": ("k", "v"),
    "encode_tiles": ("tiles",),
}
"""The KV operators that can be measured, and the arrays that they write."""
_MODEL = ("linear", "rms_norm", "loops")
"""A model's own work: their last arrays are their results, as many as ``_outputs`` says."""

_MISALIGNED = 27
"""Tokens in the cache before an append, so that it begins inside a tile."""


def measurable(shape: KernelShape) -> bool:
    """Whether there are arguments for an operator."""
    return shape.operator in RESULTS or shape.operator in _MODEL


@dataclass(frozen=True)
class Parameter:
    """One array: its name in the definition, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Measurement:
    """What a kernel is measured on."""

    shape: KernelShape
    parameters: tuple[Parameter, ...]

    @property
    def results(self) -> list[int]:
        """The numbers of the parameters that the kernel writes."""
        if self.of_model:
            return list(range(len(self.parameters) - _outputs(self.shape), len(self.parameters)))
        written = RESULTS[self.shape.operator]
        return [index for index, parameter in enumerate(self.parameters) if parameter.name in written]

    @property
    def of_model(self) -> bool:
        """Whether it is of a model's own work rather than of the cache's."""
        return self.shape.operator in _MODEL

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(parameter.nbytes for parameter in self.parameters)

    def moved_bytes(self) -> int:
        """Bytes that the kernel must read and write at least."""
        if self.of_model:
            return self._model_bytes()
        sizes = {parameter.name: parameter.nbytes for parameter in self.parameters}
        counts, operator = self._counts(), self.shape.operator
        if operator == "attention_prefill":
            capacity = TOKENS * self._shape("cache")[2]
            return sum(sizes.values()) - sizes["cache"] * (capacity - self._past(counts)) // capacity
        if operator in ("append", "flush"):
            cache = self._shape("cache")
            tokens = counts["new_lengths"] if operator == "append" else counts["packed"] - counts["before"]
            written = cache[0] * cache[1] * tokens * cache[3] * 4 // TOKENS
            return written + (sizes["k"] + sizes["v"]) * tokens // max(1, self._shape("k")[2])
        if operator == "append_plain":
            batch, heads, seq, head_dim = self._shape("k")
            kept = 2 * batch * heads * min(seq, self._shape("plain")[-2]) * head_dim  # only the newest leave a trace
            return kept * ((sizes["k"] // math.prod(self._shape("k"))) + 2)
        return sum(sizes.values())

    def _model_bytes(self) -> int:
        """All arrays; of one that is looked up in, as much as comes out."""
        written = sum(self.parameters[index].nbytes for index in self.results)
        gathered = self.shape.properties.get("gathered", ())
        sizes = [
            min(parameter.nbytes, written) if index in gathered else parameter.nbytes
            for index, parameter in enumerate(self.parameters)
        ]
        return sum(sizes)

    def flops(self) -> int:
        """Multiplications and additions of the products that are most of its work; 0 where bytes are."""
        found = self.shape.properties
        if self.shape.operator == "linear":
            rows = math.prod(self.parameters[0].shape[:-1])
            return 2 * rows * int(found["in_features"]) * int(sum(found["out_features"]))
        if self.shape.operator == "attention_prefill":
            counts = self._counts()
            new = counts["new_lengths"]
            seen = new * self._past(counts) + new * (new + 1) // 2
            return 4 * self._shape("q")[0] * int(found["heads"]) * int(found["head_dim"]) * seen
        return 0

    def arrays(self, device: Any) -> list[Any]:
        """The arrays on a ``BenchmarkDevice``; results are zeros, or a cache's random content where it is updated."""
        if self.of_model:
            results = self.results
            return [_plain(device, p, index in results) for index, p in enumerate(self.parameters)]
        counts = self._counts()
        makers = {parameter.name: self._maker(parameter, counts) for parameter in self.parameters}
        return [makers[parameter.name](device) for parameter in self.parameters]

    def _maker(self, parameter: Parameter, counts: dict[str, int]) -> Callable[[Any], Any]:
        name, dtype, shape = parameter.name, parameter.dtype, parameter.shape
        if name in counts and dtype == "int32":
            return lambda device: device.argument(device.native(np.full(shape, counts[name], np.int32)))
        if name in ("cache", "tiles"):
            return lambda device: device.argument(_tiles(device, shape, self._halves(shape[-1])))
        if name == "centre":
            return lambda device: device.argument(_centres(device, shape))
        if name in RESULTS[self.shape.operator] and name != "plain":
            return lambda device: device.empty(shape, dtype)
        if name == "gain":
            return lambda device: device.argument(device.uniform(0.5, 1.5, shape, dtype))
        if name.startswith(("rotation", "inverse", "coefficients", "sketch_")):
            # About as long as before: of a dense rotation's rows, or of its layers' blocks.
            most = math.sqrt(3 / shape[-1]) if len(shape) == 2 else 0.8
            return lambda device: device.argument(device.uniform(-most, most, shape, dtype))
        if dtype in ("uint8", "uint16"):  # codes
            top = 2 ** min(8, int(KVFormat.parse(str(self.shape.properties.get("format", "hurwitz1"))).bits))
            return lambda device: device.argument(
                device.native(np.random.default_rng(0).integers(0, top, shape).astype(dtype))
            )
        return lambda device: device.argument(device.normal(shape, dtype))

    def _halves(self, words: int) -> list[tuple[int, int, str]]:
        """(first word, words, dtype) of the parts of a tile that hold 16-bit floats; none where formats are unknown."""
        found = self.shape.properties
        if "head_dim" not in found or not {"k", "format"} & found.keys():
            return []
        head_dim = int(found["head_dim"])
        layout: TileLayout | KeyLayout
        if "k" in found:
            layout = TileLayout(KVFormat.parse(found["k"]), KVFormat.parse(found["v"]), head_dim)
        else:
            layout = KeyLayout(KVFormat.parse(found["format"]), head_dim)
        if layout.tile_bytes != 4 * words:
            return []
        parts = []
        for name, section in layout.sections.items():
            codebook = getattr(layout, name[0]).codebook
            if section.nbytes and (name.endswith("gains") or (name.endswith("codes") and codebook in _FLOATS)):
                dtype = _FLOATS.get(codebook, "float16")
                parts.append((section.offset // 4, section.nbytes // 4, dtype))
        return parts

    def _shape(self, name: str) -> tuple[int, ...]:
        return next(parameter.shape for parameter in self.parameters if parameter.name == name)

    def _past(self, counts: dict[str, int]) -> int:
        return counts["lengths"] - counts["new_lengths"]

    def _counts(self) -> dict[str, int]:
        """How many tokens every sequence has, by the names of the arrays that say so."""
        shapes = {parameter.name: parameter.shape for parameter in self.parameters}
        capacity = TOKENS * shapes["cache"][2] if "cache" in shapes else 0
        new = shapes["k"][2] if "k" in shapes and len(shapes["k"]) == 4 else 1
        policy = CachePolicy.parse(str(self.shape.properties.get("policy", "")))
        plain = policy.sinks + policy.recent

        def packed(tokens: int) -> int:
            return max(0, tokens - plain) // policy.block * policy.block

        operator = self.shape.operator
        if operator == "attention_prefill":
            past = max(0, capacity - new)
            return {"packed": min(packed(past), capacity), "lengths": past + new, "new_lengths": new}
        if operator == "append":
            return {"lengths": min(capacity, new + _MISALIGNED), "new_lengths": new}
        if operator == "append_plain":
            return {"packed": packed(plain + new), "lengths": plain + new, "new_lengths": new}
        if operator == "flush":
            moved = min(capacity, max(policy.block, packed(plain + new)))
            return {"before": 0, "packed": moved, "lengths": moved + plain, "new_lengths": new}
        return {"packed": capacity, "lengths": capacity + plain if policy.segmented else capacity}


def _outputs(shape: KernelShape) -> int:
    """How many results one of the model's operators has."""
    if shape.operator == "linear":
        return 1 if shape.properties.get("gated") else len(shape.properties["out_features"])
    return int(shape.properties.get("results", 1))


def _plain(device: Any, parameter: Parameter, result: bool) -> Any:
    """Normal numbers; zeros for integers, which may be places in another array, and for results."""
    if result or not parameter.dtype.startswith(("float", "bfloat")):
        return device.empty(parameter.shape, parameter.dtype)
    return device.argument(device.normal(parameter.shape, parameter.dtype))


_FLOATS = {"half": "float16", "bfloat16": "bfloat16"}


def _tiles(device: Any, shape: tuple[int, ...], halves: Sequence[tuple[int, int, str]]) -> Any:
    """Random codes, gains around 1."""
    words = device.view(device.words(shape), "int32")
    for first, count, dtype in halves:
        values = device.uniform(0.5, 1.5, (*shape[:-1], 2 * count), dtype)
        words[..., first : first + count] = device.view(values, "int32")
    return device.view(words, "uint32")


def _centres(device: Any, shape: tuple[int, ...]) -> Any:
    """Random means with scales around 1/100."""
    words = device.view(device.words(shape), "int32")
    words[..., -1:] = device.view(device.uniform(0.005, 0.015, (*shape[:-1], 1), "float32"), "int32")
    return device.view(words, "uint32")
