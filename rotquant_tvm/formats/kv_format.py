"""KV formats: rotation + codebook + bits + gain rule, spelled in one word."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from ..errors import FormatError
from .codebook import CODEBOOK_BITS, HEAD_DIMS
from .gains import GAIN_RULES
from .linear import LINEAR_BLOCK
from .rotation import Rotation, rotation_families, rotation_family, rotation_structure
from .trellis import TRELLIS_BITS, TRELLIS_HEAD_DIMS

if TYPE_CHECKING:
    from .codec import Codec

_PRESETS = {"rq2": "hurwitz2+tcq", "rq3": "hurwitz3", "rq4": "hurwitz4"}
_CODEBOOK_BITS = {
    "half": (16,),
    "bfloat16": (16,),
    "linear": (4, 8),
    "lloyd": CODEBOOK_BITS,
    "trellis": TRELLIS_BITS,
    "split": (2, 3),
    "sketched": (1, 2, 3),
    "sign": (1,),
}
_CODEBOOK_GAINS = {
    "half": ("none",),
    "bfloat16": ("none",),
    "linear": ("block",),
    "lloyd": tuple(GAIN_RULES),
    "trellis": tuple(GAIN_RULES),
    "split": tuple(GAIN_RULES),
    "sketched": tuple(GAIN_RULES),
    "sign": ("raw",),
}
TRELLIS_SUFFIX = "+tcq"
"""What is appended to the spelling of a lloyd format of 2 to 4 bits to code it on a trellis."""
TAKEN_HEAD_DIMS = "KV formats take multiples of 16 from 32 to 256, and 512"
"""``HEAD_DIMS`` in words."""

_UNROTATED = ("half", "bfloat16", "linear")
_TURBOQUANT = ("turbo", "dense")
"""The rotations of TurboQuant's two forms, which have the formats ``turbo2.5`` and ``turbo3+qjl``."""


@dataclass(frozen=True)
class KVFormat:
    """One format of K or V.

    name      its one-word spelling, which ``parse`` reads back.
    rotation  the rotation family's name ("none" for the formats without, "gaussian" for a sketch in its place).
    codebook  "half", "bfloat16" (16 bits, no gain), "linear" (8 or 4, a gain per block of 32), "lloyd" (1 to 4),
              "trellis" (2 to 4, see ``trellis``),
              "split" (2 or 3, one more for half of the channels), "sketched" (1 to 3 and a sign sketch of the
              residual), "sign" (1: a sign sketch alone).
    bits      bits per code in the codes section of a tile.
    gain      "none", "block", or the rule of codebooks behind a rotation: "raw", "norm", "mse", "ip".

    Raises ``FormatError`` for a combination that does not exist.
    """

    name: str
    rotation: str
    codebook: str
    bits: int
    gain: str

    def __post_init__(self) -> None:
        if self.codebook not in _CODEBOOK_BITS:
            raise FormatError(f"unknown codebook '{self.codebook}'; known: {', '.join(_CODEBOOK_BITS)}")
        if self.bits not in _CODEBOOK_BITS[self.codebook]:
            known = ", ".join(map(str, _CODEBOOK_BITS[self.codebook]))
            raise FormatError(f"'{self.name}': {self.codebook} codebooks have {known} bits, not {self.bits}")
        if self.gain not in _CODEBOOK_GAINS[self.codebook]:
            known = ", ".join(_CODEBOOK_GAINS[self.codebook])
            raise FormatError(
                f"'{self.name}': {self.codebook} codebooks take gain {known}, not '{self.gain}'"
            )
        if self.codebook in _UNROTATED and self.rotation != "none":
            raise FormatError(f"'{self.name}': {self.codebook} codebooks take no rotation, use 'none'")
        if self.codebook == "sign" and self.rotation != "gaussian":
            raise FormatError(f"'{self.name}': sign codebooks take the rotation 'gaussian', not '{self.rotation}'")
        if self.codebook != "sign" and self.rotation not in rotation_families():
            raise FormatError(f"'{self.name}': unknown rotation '{self.rotation}'")

    @classmethod
    def parse(cls, text: str) -> KVFormat:
        """Return the format that a word names, e.g. ``iso3``, ``q8_0``, ``rq3``, ``turbo2:mse``.

        A suffix ``:raw``, ``:norm``, ``:mse`` or ``:ip`` replaces the gain rule; it may also stand before ``+tcq``.
        Raises ``FormatError`` for an unknown word, listing near spellings.
        """
        base, colon, gain = str(text).strip().lower().partition(":")
        gain, plus, extension = gain.partition("+")
        word = base + plus + extension
        known = known_formats()
        if word not in known:
            near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            known_words = ", ".join(_patterns())
            numbers = f"N = 1 to 4; 2 to 4 with {TRELLIS_SUFFIX}"
            raise FormatError(f"unknown KV format '{text}'; {hint}Known: {known_words} ({numbers})")
        found = known[word]
        if not colon or gain == found.gain:
            return found
        taken = _CODEBOOK_GAINS[found.codebook]
        if len(taken) == 1 or gain not in taken:
            rules = ", ".join(f":{rule}" for rule in taken) if len(taken) > 1 else "none"
            raise FormatError(f"'{text}': unknown gain rule '{gain}'; {found.name} takes {rules}")
        return replace(found, name=f"{found.name}:{gain}", gain=gain)

    def check(self, head_dim: int) -> None:
        """Raise ``FormatError`` if the format cannot take a head dimension, saying what to use instead."""
        if head_dim not in HEAD_DIMS:
            raise FormatError(
                f"{self.name} cannot take head_dim {head_dim}: {TAKEN_HEAD_DIMS}, and no format takes another; "
                "use a model with such heads"
            )
        if self.codebook == "trellis" and head_dim not in TRELLIS_HEAD_DIMS:
            raise FormatError(
                f"{self.name} cannot take head_dim {head_dim}: trellises take {TRELLIS_HEAD_DIMS[-1]} at most; "
                f"use {self.name.replace(TRELLIS_SUFFIX, '')}"
            )
        if self.codebook == "split" and head_dim % 32:
            raise FormatError(
                f"{self.name} cannot take head_dim {head_dim}: half of it must be a multiple of 16; "
                f"use {self.rotation}{self.bits} or {self.rotation}{self.bits + 1}"
            )
        try:
            rotation_structure(self.rotation, head_dim)
        except FormatError as error:
            raise FormatError(f"{self.name} cannot take head_dim {head_dim}: {error}") from error

    def gains_per_vector(self, head_dim: int) -> int:
        """Return how many fp16 gains a vector of ``head_dim`` elements has."""
        if self.gain == "none":
            return 0
        if self.gain == "block":
            return -(-head_dim // LINEAR_BLOCK)
        return 2 if self.codebook == "sketched" else 1

    @property
    def sketched(self) -> bool:
        """Whether a sign sketch is stored: such a format serves inner products (search), not a cache."""
        return self.codebook in ("sketched", "sign")

    def plane_dims(self, head_dim: int) -> int:
        """Return how many leading dims have one more bit, kept in a plane of its own (a tile's extra section)."""
        return {"split": head_dim // 2, "sketched": head_dim}.get(self.codebook, 0)

    def bits_per_element(self, head_dim: int) -> float:
        """Return the true bits per element, gains included (3.125 for 3 bits at head_dim 128)."""
        return self.bits + (self.plane_dims(head_dim) + 16 * self.gains_per_vector(head_dim)) / head_dim

    def codec(self, head_dim: int, seed: int | Sequence[int] = 0) -> Codec:
        """Return the NumPy reference for vectors of ``head_dim``, its rotation drawn from ``seed``.

        Raises ``FormatError`` as ``check`` does.
        """
        from .codec import Codec
        from .sketch import draw_sketch

        self.check(head_dim)
        sketch = draw_sketch(head_dim, seed) if self.codebook == "sketched" else None
        return Codec(self, Rotation.draw(self.rotation, head_dim, seed), sketch)

    def __str__(self) -> str:
        return self.name


def parse_pair(text: str) -> tuple[KVFormat, KVFormat]:
    """Return the K and V formats of ``"iso3/planar3"``; one word alone is both.

    A preset's keys have the gain rule ``ip``: unbiased scores matter more than the keys' own error.
    Raises ``FormatError``, also for a format that no cache can have: one with a sign sketch.
    """
    words = str(text).split("/")
    if len(words) > 2:
        raise FormatError(
            f"'{text}' names {len(words)} formats; write K/V (iso3/planar3) or one word for both"
        )
    k, v = _key_format(words[0]), KVFormat.parse(words[-1])
    for found in (k, v):
        if found.sketched:
            raise FormatError(
                f"{found.name} is a format for search, not for a cache: attention also compares tokens that are not "
                f"quantized, which a sketch cannot; use {_without_sketch(found)}, whose inner products are unbiased too"
            )
    return k, v


def preset_of(word: str) -> str | None:
    """Return the preset that a word begins with, ``rq3`` for ``" RQ3+tcq:mse "``; None for other words."""
    base = word.strip().lower().partition(":")[0].removesuffix(TRELLIS_SUFFIX)
    return base if base in _PRESETS else None


def _key_format(word: str) -> KVFormat:
    found = KVFormat.parse(word)
    unsaid = preset_of(word) is not None and ":" not in word
    return KVFormat.parse(f"{found.name}:ip") if unsaid else found


def _without_sketch(found: KVFormat) -> str:
    """Spell the format of the same size without a sketch."""
    return "turbo1:ip" if found.codebook == "sign" else f"{found.rotation}{found.bits + 1}:ip"


@lru_cache(maxsize=1)
def known_formats() -> dict[str, KVFormat]:
    """Return every spelling (gain suffixes apart) and its format; aliases map to the canonical one."""
    known = {
        "f16": KVFormat("f16", "none", "half", 16, "none"),
        "bf16": KVFormat("bf16", "none", "bfloat16", 16, "none"),
        "q8_0": KVFormat("q8_0", "none", "linear", 8, "block"),
        "q4_0": KVFormat("q4_0", "none", "linear", 4, "block"),
        "qjl1": KVFormat("qjl1", "gaussian", "sign", 1, "raw"),
    }
    for family in map(rotation_family, _TURBOQUANT):
        for bits in _CODEBOOK_BITS["split"]:
            name = f"{family.name}{bits}.5"
            known[name] = KVFormat(name, family.name, "split", bits, family.gain)
        for bits in _CODEBOOK_BITS["sketched"]:
            name = f"{family.name}{bits + 1}+qjl"
            known[name] = KVFormat(name, family.name, "sketched", bits, "raw")
    families = [family for family in rotation_families().values() if family.spelling]
    for family in families:
        for bits in CODEBOOK_BITS:
            name = family.spelling.format(bits=bits)
            known[name] = KVFormat(name, family.name, "lloyd", bits, family.gain)
            known |= {alias.format(bits=bits): known[name] for alias in family.aliases}
            if bits in TRELLIS_BITS:
                coded = KVFormat(f"{name}{TRELLIS_SUFFIX}", family.name, "trellis", bits, "mse")
                spellings = (name, *(alias.format(bits=bits) for alias in family.aliases))
                known |= {f"{spelling}{TRELLIS_SUFFIX}": coded for spelling in spellings}
    for preset, name in _PRESETS.items():
        in_trellis = name.removesuffix(TRELLIS_SUFFIX) + TRELLIS_SUFFIX
        known |= {preset: known[name], preset + TRELLIS_SUFFIX: known[in_trellis]}
    return known


def _patterns() -> list[str]:
    published = ["qjl1", *(f"{name}{tail}" for name in _TURBOQUANT for tail in ("2.5", "3.5", "N+qjl"))]
    spellings = [
        spelling
        for family in rotation_families().values()
        if family.spelling
        for spelling in (family.spelling, *family.aliases)
    ]
    words = [spelling.format(bits="N") for spelling in spellings]
    return ["f16", "bf16", "q8_0", "q4_0", *published, *words, *_PRESETS]
