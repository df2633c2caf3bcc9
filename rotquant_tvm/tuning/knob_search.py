"""The order in which a task's knobs are tried: the rule's own, promising ones, then neighbours of the best.

Where nothing is known to be promising, some at random come before the neighbours.

Spaces are small. Choices that a rule declines, or that give a kernel which has been measured already, cost no trial.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import tvm_ffi
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from ..schedules.knobs import Knobs, kernel_for, with_knobs
from .knob_space import schedule_with
from .trace_document import typical_seconds
from .trial_files import TrialFiles
from .trials import trials_of
from .tuning_task import TuningTask, without_choice

_RANDOM_SHARE = 0.6
"""Of a task's trials, where nothing is promising."""


@dataclass
class KnobSearch:
    """Chooses what to try next for one task, in at most ``trials`` trials.

    ``early_stopping``: end after so many trials without a new best; 0 never does. ``seconds`` has what is measured, by
    choice; the empty choice is the rule's own. Trials of an earlier run count.
    """

    task: TuningTask
    trials: int
    early_stopping: int = 0
    seed: int = 0
    seconds: dict[tuple[tuple[str, int], ...], float] = field(default_factory=dict)
    _kernels: set[int] = field(default_factory=set)
    _pending: int = 0
    _since_best: int = 0
    _order: list[Knobs] | None = None
    _ended: bool = False

    def tell(self, knobs: Knobs, seconds: float) -> None:
        """Take in a measurement, ``math.inf`` for a failure."""
        best = min(self.seconds.values(), default=math.inf)
        self._since_best = 0 if seconds < best else self._since_best + 1
        self.seconds[_key(knobs)] = min(seconds, self.seconds.get(_key(knobs), math.inf))
        self._pending = max(0, self._pending - 1)

    def ask(self, count: int) -> list[Knobs]:
        """Return what to try next, at most ``count`` choices; none when the task is done."""
        resumed = bool(self.seconds) and not self._kernels
        self._ended = True  # unless there is more
        left = self.trials - len(self.seconds) - self._pending
        if left <= 0 or (self.early_stopping and self._since_best >= self.early_stopping):
            return []
        if self._order is None:
            self._order = self._shuffled()
            self._forget_measured()
        chosen = list(itertools.islice(self._fresh(), min(count, left)))
        if resumed and chosen and chosen[0]:
            chosen.insert(0, {})  # measured again: what the others' results are compared with is not kept
        self._pending += len(chosen)
        self._ended = not chosen
        return chosen

    def stop(self) -> None:
        """Ask for nothing more."""
        self.trials = 0

    def left(self) -> int:
        """How many candidates may still come, at most."""
        space = 1 + math.prod(len(values) for values in self.task.knobs.values())
        return 0 if self._ended else max(0, min(self.trials, space) - len(self.seconds))

    def recall(self, files: TrialFiles) -> None:
        """Take in what the files of trials have of the task."""
        for trial in reversed(trials_of(self.task, files)):  # of equal choices the fastest counts
            if trial.knobs and not self._in_space(trial.knobs):  # the rule's knobs had other values then
                continue
            self.seconds[_key(trial.knobs)] = trial.seconds

    def _in_space(self, knobs: Knobs) -> bool:
        space = self.task.knobs
        return knobs.keys() == space.keys() and all(value in space[name] for name, value in knobs.items())

    def unfinished(self) -> bool:
        """Whether there is anything to try."""
        return bool(replace(self, seconds=dict(self.seconds), _kernels=set(), _order=None).ask(1))

    def _fresh(self) -> Iterator[Knobs]:
        """Choices not tried yet whose kernels are new, in order of promise."""
        assert self._order is not None
        if () not in self.seconds and self._is_new({}):
            yield {}
        first = self.task.promising
        for knobs in first:
            if _key(knobs) not in self.seconds and self._is_new(knobs):
                yield knobs
        if first or len(self.seconds) >= 1 + _RANDOM_SHARE * (self.trials - 1):
            for knobs in self._neighbours():
                if _key(knobs) not in self.seconds and self._is_new(knobs):
                    yield knobs
        while self._order:
            knobs = self._order.pop()
            if _key(knobs) not in self.seconds and self._is_new(knobs):
                yield knobs

    def _neighbours(self) -> Iterator[Knobs]:
        """The best choice with one knob a step up or down."""
        measured = {key: seconds for key, seconds in self.seconds.items() if key and seconds < math.inf}
        for key in sorted(measured, key=measured.__getitem__)[:2]:
            best = dict(key)
            for name, values in self.task.knobs.items():
                at = values.index(best[name])
                for step in (-1, 1):
                    if 0 <= at + step < len(values):
                        yield best | {name: values[at + step]}

    def _shuffled(self) -> list[Knobs]:
        names = list(self.task.knobs)
        choices = [dict(zip(names, values, strict=True)) for values in itertools.product(*self.task.knobs.values())]
        random.Random(f"{self.seed} {self.task.name}").shuffle(choices)
        return choices

    def _forget_measured(self) -> None:
        for key in self.seconds:
            self._is_new(dict(key))

    def _is_new(self, knobs: Knobs) -> bool:
        """Whether the rule has a kernel for a choice, and it is another than all before."""
        try:
            kernel = kernel_for(with_knobs(self.task.definition, knobs), self.task.target)
        except (ValueError, RuntimeError, AssertionError):  # a rule may also say no in this way
            return False
        if kernel is None:
            return False
        digest = int(tvm_ffi.structural_hash(without_choice(kernel)))
        new = digest not in self._kernels
        self._kernels.add(digest)
        return new


def _key(knobs: Knobs) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(knobs.items()))


@dataclass
class Allowance:
    """How many candidates all searches of a run may still ask for; None is any number."""

    left: int | None = None

    def most(self, wanted: int) -> int:
        """How many of those ``wanted`` there are."""
        return wanted if self.left is None else min(wanted, self.left)

    def spend(self, count: int) -> None:
        """Note that so many were asked for, perhaps more than there were: a resumed search measures its rule again."""
        if self.left is not None:
            self.left = max(0, self.left - count)


@derived_object
class KnobStrategy(ms.search_strategy.PySearchStrategy):  # type: ignore[misc]
    """A ``KnobSearch`` as MetaSchedule's task scheduler drives it."""

    def __init__(
        self,
        search: KnobSearch,
        batch: int,
        begin: Callable[..., None] | None = None,
        allowance: Allowance | None = None,
    ) -> None:
        """Ask for ``batch`` candidates at a time, within an ``allowance`` that searches share.

        ``begin(modules, target)`` starts to compile the first of them. The scheduler opens all tasks before it turns to
        the first, so that the first batches of all are compiled side by side.
        """
        super().__init__()
        self.search, self.batch, self.begin = search, batch, begin
        self.allowance = allowance or Allowance()
        self.space: Any = None
        self.asked: list[Knobs] = []
        self._first: list[Any] | None = None

    def _initialize_with_tune_context(self, context: Any) -> None:
        pass

    def pre_tuning(
        self, max_trials: int, num_trials_per_iter: int, design_spaces: Any, database: Any = None, cost_model: Any = 0
    ) -> None:
        """Keep the space, and begin."""
        self.space = design_spaces[0].trace
        if self.begin is not None:
            self._first = self._ask()
            self.begin([candidate.sch.mod for candidate in self._first], self.search.task.target)

    def post_tuning(self) -> None:
        """End."""

    def generate_measure_candidates(self) -> Any:
        """The next candidates; None when there are no more."""
        candidates, self._first = self._ask() if self._first is None else self._first, None
        return candidates or None

    def _ask(self) -> list[Any]:
        most, task = self.allowance.most(self.batch), self.search.task
        self.asked = self.search.ask(most) if most else []
        self.allowance.spend(len(self.asked))
        scheduled = [schedule_with(task.workload, self.space, knobs) for knobs in self.asked]
        return [ms.MeasureCandidate(sch, task.args_info) for sch in scheduled]

    def notify_runner_results(self, measure_candidates: Any, results: Any) -> None:
        """Take in the times of the last candidates."""
        for knobs, result in zip(self.asked, results, strict=True):
            self.search.tell(knobs, math.inf if result.error_msg else typical_seconds(result.run_secs))

    def clone(self) -> Any:
        """A strategy for the same search: a search is not to be done twice."""
        return KnobStrategy(self.search, self.batch, self.begin, self.allowance)
