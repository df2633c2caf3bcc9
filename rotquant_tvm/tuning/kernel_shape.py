"""What a kernel is specialized on, and how far two specializations are from each other.

A definition says so itself: by its operator and by JSON attributes named ``rotquant.…``. Kernels of one operator do the
same work as soon as they read the same layout, so records are shared between formats that differ in nothing that the
operator computes, and lent to shapes with other numbers of heads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from ..cache_policy import CachePolicy
from ..errors import RotQuantError
from ..formats import KVFormat, rotation_structure
from ..ops.model_op import MODEL_OP_ATTR, model_op
from ..ops.site_shape import OP_ATTR
from ..schedules.kernel_by_size import SIZES_ATTR
from ..schedules.knobs import KNOBS_ATTR, RECORD_ATTR

PREFIX = "rotquant."
KERNEL_ATTR = "rotquant.kernel"
"""Attribute of a workload: the rule and its hash, so that records of another kernel are not taken for its own."""

_NO_PROPERTY = (OP_ATTR, MODEL_OP_ATTR, KNOBS_ATTR, SIZES_ATTR, RECORD_ATTR, KERNEL_ATTR)
_DECODERS = ("attention_decode", "attention_prefill", "dequantize_cache", "dequantize_segments")
"""Operators that read codes and know nothing of the rotation and gain rule that made them."""
_WITHOUT_EFFECT = ("scale", "splits", "after", "name")
"""Numbers that change no instruction, that are knobs themselves, or that only order calls; names."""
_FORMATS = ("k", "v", "format")
_EXTRAS = ("window", "rotated", "softcap")
"""What a kernel does or does not do beside its work."""
_SCALED = ("heads", "kv_heads")
"""Numbers whose kernels are alike; the ratio counts."""
GROUP_WEIGHT = 2.0
"""Query heads per kv head change what a kernel computes per byte; more kv heads only add blocks."""
BIT_DISTANCE, EXTRA_DISTANCE = 1.0, 2.0
"""How far a bit more in one format is, and work beside the main loop, in doublings of the number of heads."""


@dataclass(frozen=True)
class KernelShape:
    """An operator and its ``properties``, plain JSON data."""

    operator: str
    properties: Mapping[str, Any]

    @classmethod
    def of(cls, func: tirx.PrimFunc) -> KernelShape | None:
        """Read what a definition carries; None if it is neither an operator of this project nor one of a model's."""
        attrs = dict(func.attrs.items()) if func.attrs is not None else {}
        operator = attrs.get(OP_ATTR, model_op(func))
        if operator is None:
            return None
        properties: dict[str, Any] = {}
        for name in sorted(attrs):
            if name.startswith(PREFIX) and name not in _NO_PROPERTY:
                value = _plain(attrs[name])
                properties |= value if isinstance(value, dict) else {name.removeprefix(PREFIX): value}
        return cls(str(operator), properties)

    @property
    def formats(self) -> str:
        """The formats as users write them: ``hurwitz3/f16``; empty for operators without.

        Operators that know the codebook alone have that, ``lloyd3``.
        """
        names = [self.properties[key] for key in _FORMATS if key in self.properties]
        if not names and {"codebook", "bits"} <= self.properties.keys():
            return f"{self.properties['codebook']}{self.properties['bits']}"
        return "/".join(dict.fromkeys(map(str, names)))

    @property
    def label(self) -> str:
        """Formats, heads and head dimension in short: ``hurwitz3 32/8x128 sinks=4``."""
        found = self.properties
        heads = "/".join(str(found[key]) for key in _SCALED if key in found)
        dim = str(found.get("head_dim", ""))
        size = "x".join(filter(None, (heads, dim)))
        words = [self.formats, size, str(found.get("dtype", "")), str(found.get("policy", "")), *_model_words(found)]
        words.append(",".join(f"{block}x{stride}" for block, stride in found.get("structure", ())))
        words += [name if found[name] is True else f"{name}={found[name]}" for name in _EXTRAS if found.get(name)]
        words += ["rotates rows"] if "rotations" in found else []
        # The others of a chunk's operators have names of their own, or are the same for a single token.
        words += ["chunk"] if self.operator == "flush" and found.get("chunk") else []
        return " ".join(filter(None, words))

    def distance(self, other: KernelShape) -> float | None:
        """How far ``other`` is, 0 for a kernel of the same code; None where its choices mean nothing here."""
        if self.operator != other.operator:
            return None
        mine, theirs = self.essence(), other.essence()
        parts = ("kind", "scaled", "bits")
        if mine["kind"] != theirs["kind"] or any(mine[part].keys() != theirs[part].keys() for part in parts):
            return None
        scaled = [
            (GROUP_WEIGHT if name == "group" else 1.0) * abs(math.log2(value / theirs["scaled"][name]))
            for name, value in mine["scaled"].items()
        ]
        bits = [abs(value - theirs["bits"][name]) for name, value in mine["bits"].items()]
        extras = set(mine["extras"]) ^ set(theirs["extras"])
        return float(sum(scaled) + BIT_DISTANCE * sum(bits) + EXTRA_DISTANCE * len(extras))

    def essence(self) -> dict[str, Any]:
        """What kernels of distance 0 have in common, as JSON data.

        ``kind``: what must agree; ``scaled``: numbers whose ratio counts; ``bits`` of the formats; ``extras``:
        what a kernel does beside its work.
        """
        kind: dict[str, Any] = {}
        bits: dict[str, int] = {}
        extras: list[str] = []
        for name, value in self.properties.items():
            if name in _WITHOUT_EFFECT or name in _SCALED or not value:  # what is new in a version is off at first
                continue
            if name in _FORMATS:
                kind[name], bits[name] = _format_kind(str(value), self.properties, self.operator in _DECODERS)
            elif name == "policy":
                extras += _policy_kind(str(value))
            elif name in _EXTRAS:
                extras.append(name)
            else:
                kind[name] = value
        return {"kind": kind, "scaled": self._scaled(), "bits": bits, "extras": sorted(extras)}

    def _scaled(self) -> dict[str, float]:
        found = {name: float(self.properties[name]) for name in _SCALED if name in self.properties}
        if len(found) == len(_SCALED):
            found = {"group": found["heads"] / found["kv_heads"], "kv_heads": found["kv_heads"]}
        return found


def _model_words(found: Mapping[str, Any]) -> list[str]:
    """What tells one of a model's own kernels from another: features of a linear layer or a norm, a function's name."""
    words = []
    if "in_features" in found:
        outputs = "+".join(map(str, found.get("out_features", ())))
        words.append(f"{found['in_features']}→{outputs}")
        words += [name for name in ("gated", "residual") if found.get(name)]
        words += ["bias"] if any(found.get("bias", ())) else []
        words.append(str(found.get("weight_dtype", "")))
    words += [str(found[name]) for name in ("features", "name") if name in found]
    return words + ([str(found["loops"])[:6]] if "loops" in found else [])


def _plain(value: Any) -> Any:
    """An attribute as JSON data."""
    text = str(value)
    try:
        return json.loads(text)
    except ValueError:
        return text


def _format_kind(name: str, properties: Mapping[str, Any], reads_only: bool) -> tuple[list[Any], int]:
    """What kernels of two formats must have in common, and the bits of a code."""
    try:
        found = KVFormat.parse(name)
        if reads_only:
            return [found.codebook, found.gain in ("none", "block")], found.bits
        structure = rotation_structure(found.rotation, int(properties["head_dim"])) if found.codebook != "sign" else ()
        return [found.codebook, found.gain, [list(layer) for layer in structure]], found.bits
    except (RotQuantError, KeyError, TypeError):  # a record of formats that this version does not have
        return [name], 0


def _policy_kind(text: str) -> list[str]:
    try:
        policy = CachePolicy.parse(text)
    except RotQuantError:
        return []
    return [name for name, on in (("segmented", policy.segmented), ("center", policy.center)) if on]
