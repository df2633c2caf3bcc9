"""Options that stand before the command, as the tvmc of TVM 0.19 had them there: ``tvmc -v compile …``."""

from __future__ import annotations

from collections.abc import Container, Sequence

_FLAGS = ("--json", "--verbose", "--quiet")
_SHORT = ("v", "q")
"""The flags of every command: the ones that ``options.common_options`` adds."""


def behind_the_command(argv: Sequence[str], commands: Container[str]) -> list[str]:
    """Put the flags that stand before the command right behind it; other words before it stay, to be refused."""
    at = next((index for index, word in enumerate(argv) if word in commands), None)
    if at is None:
        return list(argv)
    flags = [word for word in argv[:at] if _is_flag(word)]
    others = [word for word in argv[:at] if not _is_flag(word)]
    return [*others, argv[at], *flags, *argv[at + 1 :]]


def _is_flag(word: str) -> bool:
    short = word[:1] == "-" and len(word) > 1 and all(letter in _SHORT for letter in word[1:])
    return short or word in _FLAGS
