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
from .rotation import Rotation, rotation_families, rotation_structure

if TYPE_CHECKING:
    from .codec import Codec

LINEAR_BLOCK = 32
"""How many neighbouring elements share one scale in q8_0."""

_PRESETS = {"rq2": "hurwitz2", "rq3": "hurwitz3", "rq4": "hurwitz4"}
_CODEBOOK_BITS = {"half": (16,), "bfloat16": (16,), "linear": (8,), "lloyd": CODEBOOK_BITS}
_CODEBOOK_GAINS = {"half": ("none",), "bfloat16": ("none",), "linear": ("block",), "lloyd": tuple(GAIN_RULES)}


@dataclass(frozen=True)
class KVFormat:
    """One format of K or V.

    name      its one-word spelling, which ``parse`` reads back.
    rotation  the rotation family's name ("none" for the formats without).
    codebook  "half", "bfloat16" (16 bits, no gain), "linear" (8, a gain per block of 32), "lloyd" (1 to 4).
    bits      bits per code.
    gain      "none", "block", or the lloyd codebooks' rule: "raw", "norm", "mse", "ip".

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
        if self.codebook != "lloyd" and self.rotation != "none":
            raise FormatError(f"'{self.name}': {self.codebook} codebooks take no rotation, use 'none'")
        if self.rotation not in rotation_families():
            raise FormatError(f"'{self.name}': unknown rotation '{self.rotation}'")

    @classmethod
    def parse(cls, text: str) -> KVFormat:
        """Return the format that a word names, e.g. ``iso3``, ``q8_0``, ``rq3``, ``turbo2:mse``.

        A suffix ``:raw``, ``:norm``, ``:mse`` or ``:ip`` replaces the gain rule. Raises ``FormatError`` for
        an unknown word, listing near spellings.
        """
        word, colon, gain = str(text).strip().lower().partition(":")
        known = known_formats()
        if word not in known:
            near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            known_words = ", ".join(_patterns())
            raise FormatError(f"unknown KV format '{text}'; {hint}Known: {known_words} (N = 1 to 4)")
        found = known[word]
        if not colon or gain == found.gain:
            return found
        if found.codebook != "lloyd" or gain not in GAIN_RULES:
            rules = ", ".join(f":{rule}" for rule in GAIN_RULES) if found.codebook == "lloyd" else "none"
            raise FormatError(f"'{text}': unknown gain rule '{gain}'; {found.name} takes {rules}")
        return replace(found, name=f"{found.name}:{gain}", gain=gain)

    def check(self, head_dim: int) -> None:
        """Raise ``FormatError`` if the format cannot take a head dimension, saying what to use instead."""
        if head_dim not in HEAD_DIMS:
            raise FormatError(
                f"{self.name} cannot take head_dim {head_dim}: KV formats take multiples of 16 from 32 to 256, "
                "and no format takes another; use a model with such heads"
            )
        try:
            rotation_structure(self.rotation, head_dim)
        except FormatError as error:
            raise FormatError(f"{self.name} cannot take head_dim {head_dim}: {error}") from error

    def gains_per_vector(self, head_dim: int) -> int:
        """Return how many fp16 gains a vector of ``head_dim`` elements has."""
        if self.gain == "none":
            return 0
        return -(-head_dim // LINEAR_BLOCK) if self.gain == "block" else 1

    def bits_per_element(self, head_dim: int) -> float:
        """Return the true bits per element, gains included (3.125 for 3 bits at head_dim 128)."""
        return self.bits + 16 * self.gains_per_vector(head_dim) / head_dim

    def codec(self, head_dim: int, seed: int | Sequence[int] = 0) -> Codec:
        """Return the NumPy reference for vectors of ``head_dim``, its rotation drawn from ``seed``.

        Raises ``FormatError`` as ``check`` does.
        """
        from .codec import Codec

        self.check(head_dim)
        return Codec(self, Rotation.draw(self.rotation, head_dim, seed))

    def __str__(self) -> str:
        return self.name


def parse_pair(text: str) -> tuple[KVFormat, KVFormat]:
    """Return the K and V formats of ``"iso3/planar3"``; one word alone is both. Raises ``FormatError``."""
    words = str(text).split("/")
    if len(words) > 2:
        raise FormatError(
            f"'{text}' names {len(words)} formats; write K/V (iso3/planar3) or one word for both"
        )
    return KVFormat.parse(words[0]), KVFormat.parse(words[-1])


@lru_cache(maxsize=1)
def known_formats() -> dict[str, KVFormat]:
    """Return every spelling (gain suffixes apart) and its format; aliases map to the canonical one."""
    known = {
        "f16": KVFormat("f16", "none", "half", 16, "none"),
        "bf16": KVFormat("bf16", "none", "bfloat16", 16, "none"),
        "q8_0": KVFormat("q8_0", "none", "linear", 8, "block"),
    }
    families = [family for family in rotation_families().values() if family.spelling]
    for family in families:
        for bits in CODEBOOK_BITS:
            name = family.spelling.format(bits=bits)
            known[name] = KVFormat(name, family.name, "lloyd", bits, family.gain)
            known |= {alias.format(bits=bits): known[name] for alias in family.aliases}
    return known | {preset: known[name] for preset, name in _PRESETS.items()}


def _patterns() -> list[str]:
    spellings = [
        spelling
        for family in rotation_families().values()
        if family.spelling
        for spelling in (family.spelling, *family.aliases)
    ]
    return ["f16", "bf16", "q8_0", *(spelling.format(bits="N") for spelling in spellings), *_PRESETS]
