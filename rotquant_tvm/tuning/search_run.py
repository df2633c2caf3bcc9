"""One run of MetaSchedule's task scheduler over the searches of several tasks, which an interrupt can end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.tune import tune_tasks

from ..errors import DeviceError
from .kernel_builder import KernelBuilder
from .kernel_runner import KernelRunner, MeasuringProcess
from .knob_search import Allowance, KnobSearch, KnobStrategy
from .knob_space import knob_space
from .progress import Progress, step_of
from .tensor_intrinsics import load_tensor_intrinsics
from .trace_document import FAILED_SECONDS, typical_seconds
from .trial_files import TrialFiles

_FIRST_SHARE = 0.7
"""Of a task's trials at most are compiled at a time, so that the rest can follow the best of them."""
_FEW = 6
"""Trials of a task up to which there is no such rest: its compiler would run alone."""


class SearchRun:
    """Builds, measures and stores what the searches ask for; ``failures`` are candidates and reasons."""

    def __init__(
        self,
        searches: Sequence[KnobSearch],
        files: TrialFiles,
        process: MeasuringProcess,
        scratch: Path,
        *,
        parallel: int,
        timeout: float,
        progress: Progress,
        budget: float | None = None,
    ) -> None:
        """Use ``parallel`` compiling processes with ``timeout`` seconds for a kernel, and ``scratch`` for libraries.

        ``budget``: end after so many seconds, whatever is under way.
        """
        self.searches, self.files, self.process, self.scratch = searches, files, process, scratch
        self.parallel, self.timeout, self.progress, self.budget = parallel, timeout, progress, budget
        self.failures: list[str] = []
        self.done = self.measured = 0
        self.stopped = self.out_of_time = False
        self.error: Exception | None = None

    def run(self, most: int | None, seed: int) -> None:
        """Go on until every search is done, ``most`` candidates have been measured or the time is up.

        The scheduler runs in a thread: an interrupt would come out of its code as an error of another kind. On an
        interrupt what is under way is abandoned, and so it is when the time is up. Raises DeviceError if the device
        cannot be opened, and ``UsageError`` if a trial cannot be written.
        """
        self.since = time.monotonic()
        builder = KernelBuilder(self.scratch, self.parallel, self.timeout, self.process.remote is not None)
        runner = KernelRunner(self.process)
        try:
            self.process.open()
            self.ready = time.monotonic()
            with ThreadPoolExecutor(1) as thread:
                scheduling = thread.submit(self._schedule, builder, runner, most, seed)
                try:
                    scheduling.result(self._time_left())
                except TimeoutError:
                    self.out_of_time = True
                    self._stop(builder)
                except BaseException:
                    self._stop(builder)
                    if self.error is None:
                        raise
        finally:
            builder.close()
            runner.close()
        if self.error is not None:
            raise self.error

    def _time_left(self) -> float | None:
        return None if self.budget is None else max(0.0, self.budget - (time.monotonic() - self.since))

    def _stop(self, builder: KernelBuilder) -> None:
        self.stopped = True
        for search in self.searches:
            search.stop()
        builder.close()
        self.process.close()

    def _schedule(self, builder: KernelBuilder, runner: KernelRunner, most: int | None, seed: int) -> None:
        load_tensor_intrinsics()
        trials = max(search.trials for search in self.searches)
        batch = max(1, min(self.parallel, trials if trials <= _FEW else math.ceil(_FIRST_SHARE * trials)))
        total = len(self.searches) * (trials + 1)
        # Not where compiling would disturb what is measured, nor what may never be asked for.
        begin = builder.begin if not runner.alone and (most is None or most >= total) else None
        allowance = Allowance(most)
        tune_tasks(
            tasks=[self._context(search, batch, seed, begin, allowance) for search in self.searches],
            task_weights=[1.0] * len(self.searches),
            work_dir=str(self.scratch),
            max_trials_global=total,
            max_trials_per_task=trials + 1,
            num_trials_per_iter=batch,
            builder=builder,
            runner=runner,
            database=ms.database.MemoryDatabase(),
            cost_model=ms.cost_model.RandomModel(),
            measure_callbacks=[_Store(self)],
            task_scheduler="round-robin",
        )

    def _context(
        self, search: KnobSearch, batch: int, seed: int, begin: Callable[..., None] | None, allowance: Allowance
    ) -> ms.TuneContext:
        space = knob_space(search.task.knobs)
        return ms.TuneContext(
            search.task.workload,
            target=search.task.target,
            space_generator=ms.space_generator.ScheduleFn(space, sch_rules=[], postprocs=[], mutator_probs={}),
            search_strategy=KnobStrategy(search, batch, begin, allowance),
            task_name=search.task.name,
            rand_state=seed + 1,
            num_threads=1,
        )

    def store(self, search: KnobSearch, candidates: Any, builds: Any, runs: Any) -> None:
        """Take in a batch, unless the run was stopped while it was under way.

        An error is kept for ``run``: the scheduler would make another one of it. If the device is lost, what failed is
        not held against the candidates.
        """
        if self.stopped:
            return
        lost = self.process.lost
        try:
            for candidate, built, run in zip(candidates, builds, runs, strict=True):
                message = built.error_msg or run.error_msg
                if lost is None or not message:
                    self._store(search, candidate, message, run.run_secs)
            if lost is not None:
                raise DeviceError(f"{lost}; what was measured is kept, and the same command goes on")
        except Exception as error:
            self.error, self.stopped = error, True
            for each in self.searches:
                each.stop()
            return
        passed = time.monotonic() - self.ready
        self.progress(step_of(search, self.searches, self.process.roofline, self.done, passed, self._time_left()))

    def _store(self, search: KnobSearch, candidate: Any, message: str | None, run_secs: Any) -> None:
        seconds = [FAILED_SECONDS] if message else [float(value) for value in run_secs]
        task = search.task
        workload = ms.database.Workload(task.workload)
        record = ms.database.TuningRecord(candidate.sch.trace, workload, seconds, task.target, candidate.args_info)
        self.files.add(task.workload_document, record.as_json())
        if message:
            self.failures.append(f"{task.name}: {message}")
        self.done += 1
        self.measured += typical_seconds(seconds) < math.inf


@derived_object
class _Store(ms.measure_callback.PyMeasureCallback):  # type: ignore[misc]
    """Hands every batch to the run."""

    def __init__(self, run: SearchRun) -> None:
        super().__init__()
        self.run = run

    def apply(
        self, task_scheduler: Any, task_id: int, measure_candidates: Any, builder_results: Any, runner_results: Any
    ) -> None:
        """Called after every batch."""
        self.run.store(self.run.searches[int(task_id)], measure_candidates, builder_results, runner_results)
