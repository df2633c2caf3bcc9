"""Which of the words that are known one that is not was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST = 3


def near_words(word: str, known: Iterable[str], alike: float = 0.6) -> list[str]:
    """Up to three of the ``known`` words that are spelled like ``word``, the nearest first.

    ``alike``: from 0 (anything) to 1 (the same), as ``difflib`` counts it; case does not matter.
    """
    spelled = {name.lower(): name for name in known}
    return [spelled[name] for name in difflib.get_close_matches(word.lower(), spelled, n=_MOST, cutoff=alike)]


def did_you_mean(near: Iterable[str]) -> str:
    """``"; did you mean …"`` for an error's text, or nothing where no word is near."""
    words = " or ".join(near)
    return f"; did you mean {words}" if words else ""
