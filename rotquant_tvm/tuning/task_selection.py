"""Which tasks a tuning takes: all, numbers of the list, or parts of their names.

What can be said of a selection without the tasks is said when it is read: a model takes long to import.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..near_words import did_you_mean, near_words

if TYPE_CHECKING:
    from .tuning_task import TuningTask

_SPAN = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_MISSPELLED = 0.8
"""How much a word that is part of no operator's name must be like one to be taken for a slip of the keyboard."""


@dataclass(frozen=True)
class TaskSelection:
    """Spans of numbers (first and last) and parts of names; ``everything`` is all tasks."""

    parts: tuple[tuple[int, int] | str, ...]
    everything: bool = False

    @classmethod
    def parse(cls, text: str) -> TaskSelection:
        """Read ``all``, or ``0,2-4`` and parts of names in any order. Raises ``UsageError``."""
        if text == "all":
            return cls((), everything=True)
        parts: list[tuple[int, int] | str] = []
        for word in filter(None, (part.strip() for part in text.split(","))):
            span = _SPAN.fullmatch(word)
            if span is None:
                parts.append(word)
                continue
            first, last = int(span[1]), int(span[2] or span[1])
            if first > last:
                raise UsageError(f"--tasks {word}: the first number is beyond the last; write it like {last}-{first}")
            parts.append((first, last))
        if not parts:
            raise UsageError("--tasks is empty; give list, all, numbers like 0,2-4, or parts of names")
        return cls(tuple(parts))

    def check_names(self, operators: Iterable[str]) -> None:
        """Raise ``UsageError`` for a name that is one of the ``operators`` misspelled.

        Other words may be part of the name of a loop that only the model tells.
        """
        known = sorted(operators)
        for word in self.parts:
            first = word.lower().partition(" ")[0] if isinstance(word, str) else ""
            if any(first in name for name in known):
                continue
            if near := near_words(first, known, _MISSPELLED):
                raise UsageError(f"--tasks {word}: there is no such operator{did_you_mean(near)}; see --tasks list")

    def of(self, tasks: Sequence[TuningTask]) -> list[TuningTask]:
        """The tasks that are selected, in their order. Raises ``UsageError`` for a part that selects none."""
        if self.everything:
            return list(tasks)
        chosen: set[int] = set()
        for part in self.parts:
            if isinstance(part, str):
                named = {index for index, task in enumerate(tasks) if part.lower() in task.name.lower()}
                if not named:
                    near = did_you_mean(near_words(part, {task.shape.operator for task in tasks}))
                    raise UsageError(f"--tasks {part}: no task has that in its name{near}; see --tasks list")
                chosen |= named
            elif part[1] >= len(tasks):
                word = "-".join(map(str, dict.fromkeys(part)))
                raise UsageError(f"--tasks {word}: there are tasks 0 to {len(tasks) - 1}; see --tasks list")
            else:
                chosen.update(range(part[0], part[1] + 1))
        return [tasks[index] for index in sorted(chosen)]
