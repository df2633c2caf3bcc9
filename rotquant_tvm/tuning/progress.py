"""How far a tuning run is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .knob_search import KnobSearch
from .roofline import Roofline


@dataclass(frozen=True)
class Step:
    """What was measured last, and what is left.

    task  its name. number, tasks  which task of how many. trials, most  candidates of it, known and at most. best, rule
    seconds of the best candidate and of the rule's own, None before there are any. share  of the roofline, of the best.
    done, total  candidates of all tasks in this run. seconds  since its start. left  seconds until its end, an
    estimate; None before there is one.
    """

    task: str
    number: int
    tasks: int
    trials: int
    most: int
    best: float | None
    rule: float | None
    share: float | None
    done: int
    total: int
    seconds: float
    left: float | None


Progress = Callable[[Step], None]
"""Told after every batch of candidates."""


def step_of(
    search: KnobSearch,
    searches: Sequence[KnobSearch],
    roofline: Roofline,
    done: int,
    seconds: float,
    budget: float | None,
) -> Step:
    """The step after a batch of ``search``: ``done`` candidates in ``seconds``, and ``budget`` seconds to go."""
    rest = sum(each.left() for each in searches)
    left = seconds / done * rest if done else None
    if left is not None and budget is not None:
        left = min(left, budget)
    best = min(search.seconds.values(), default=math.inf)
    rule = search.seconds.get((), math.inf)
    return Step(
        task=search.task.name,
        number=1 + next(index for index, each in enumerate(searches) if each is search),
        tasks=len(searches),
        trials=len(search.seconds),
        most=len(search.seconds) + search.left(),
        best=best if best < math.inf else None,
        rule=rule if rule < math.inf else None,
        share=roofline.share(search.task.measurement, best),
        done=done,
        total=done + rest,
        seconds=seconds,
        left=left,
    )
