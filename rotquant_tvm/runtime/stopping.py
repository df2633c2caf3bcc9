"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from rotquant_tvm.errors import UsageError


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return the stop strings as a tuple; raises UsageError for an empty one or one that is no text."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in strings:
        if not isinstance(text, str) or not text:
            raise UsageError(f"stop string {text!r}: expected a non-empty text")
    return strings


class StopMatcher:
    """Lets text through up to the first stop string, wherever the pieces are cut.

    Text that may yet turn out to be the beginning of a stop string is held back.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take a piece of text and return what may be shown; a complete stop string sets ``matched``."""
        if self.matched is not None:
            return ""
        self._held += text
        places = [(self._held.find(string), string) for string in self._strings]
        found = [(place + len(string), place, string) for place, string in places if place >= 0]
        if found:
            # The one complete first, so that the result does not depend on where the pieces are cut.
            _, place, self.matched = min(found)
            return self._release(place, drop_rest=True)
        return self._release(len(self._held) - self._open_suffix())

    def finish(self) -> str:
        """Return the text held back, when no more will come."""
        return self._release(len(self._held))

    def _open_suffix(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(string) for string in self._strings), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._strings):
                return length
        return 0

    def _release(self, count: int, drop_rest: bool = False) -> str:
        shown = self._held[:count]
        self._held = "" if drop_rest else self._held[count:]
        return shown
