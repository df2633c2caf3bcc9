"""One run of MetaSchedule's task scheduler over the searches of several tasks, which an interrupt can end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.tune import tune_tasks

from .kernel_builder import KernelBuilder
from .kernel_runner import KernelRunner, MeasuringProcess
from .knob_search import KnobSearch, KnobStrategy
from .knob_space import knob_space
from .tensor_intrinsics import load_tensor_intrinsics
from .trials import FAILED_SECONDS, typical_seconds

Progress = Callable[[str, int], None]
"""Told what was measured (a task's name) and how many candidates."""

_FIRST_SHARE = 0.7
"""Of a task's trials at most are compiled at a time, so that the rest can follow the best of them."""


class SearchRun:
    """Builds, measures and stores what the searches ask for; ``failures`` are candidates and reasons."""

    def __init__(
        self,
        searches: Sequence[KnobSearch],
        database: Any,
        process: MeasuringProcess,
        scratch: Path,
        *,
        parallel: int,
        timeout: float,
        progress: Progress,
    ) -> None:
        """Use ``parallel`` compiling processes with ``timeout`` seconds for a kernel, and ``scratch`` for libraries."""
        self.searches, self.database, self.process, self.scratch = searches, database, process, scratch
        self.parallel, self.timeout, self.progress = parallel, timeout, progress
        self.failures: list[str] = []
        self.measured = 0
        self.stopped = False

    def run(self, most: int | None, seed: int) -> None:
        """Go on until every search is done, or ``most`` candidates have been measured.

        The scheduler runs in a thread: an interrupt would come out of its code as an error of another kind. On an
        interrupt what is under way is abandoned. Raises DeviceError if the device cannot be opened.
        """
        builder = KernelBuilder(self.scratch, self.parallel, self.timeout, self.process.remote is not None)
        runner = KernelRunner(self.process)
        try:
            self.process.open()
            with ThreadPoolExecutor(1) as thread:
                scheduling = thread.submit(self._schedule, builder, runner, most, seed)
                try:
                    scheduling.result()
                except BaseException:
                    self._stop(builder)
                    raise
        finally:
            builder.close()
            runner.close()

    def _stop(self, builder: KernelBuilder) -> None:
        self.stopped = True
        for search in self.searches:
            search.trials = 0
        builder.close()
        self.process.close()

    def _schedule(self, builder: KernelBuilder, runner: KernelRunner, most: int | None, seed: int) -> None:
        load_tensor_intrinsics()
        trials = max(search.trials for search in self.searches)
        batch = max(1, min(self.parallel, math.ceil(_FIRST_SHARE * trials)))
        total = len(self.searches) * (trials + 1)
        tune_tasks(
            tasks=[self._context(search, batch, seed) for search in self.searches],
            task_weights=[1.0] * len(self.searches),
            work_dir=str(self.scratch),
            max_trials_global=total if most is None else min(total, most),
            max_trials_per_task=trials + 1,
            num_trials_per_iter=batch,
            builder=builder,
            runner=runner,
            database=self.database,
            cost_model=ms.cost_model.RandomModel(),
            measure_callbacks=[_Store(self)],
            task_scheduler="round-robin",
        )

    def _context(self, search: KnobSearch, batch: int, seed: int) -> ms.TuneContext:
        space = knob_space(search.task.knobs)
        return ms.TuneContext(
            search.task.workload,
            target=search.task.target,
            space_generator=ms.space_generator.ScheduleFn(space, sch_rules=[], postprocs=[], mutator_probs={}),
            search_strategy=KnobStrategy(search, batch),
            task_name=search.task.name,
            rand_state=seed + 1,
            num_threads=1,
        )

    def store(self, search: KnobSearch, candidates: Any, builds: Any, runs: Any) -> None:
        """Take in a batch, unless the run was stopped while it was under way."""
        if self.stopped:
            return
        workload = self.database.commit_workload(search.task.workload)
        for candidate, built, run in zip(candidates, builds, runs, strict=True):
            message = built.error_msg or run.error_msg
            seconds = [FAILED_SECONDS] if message else [float(value) for value in run.run_secs]
            self.database.commit_tuning_record(
                ms.database.TuningRecord(
                    candidate.sch.trace, workload, seconds, search.task.target, candidate.args_info
                )
            )
            if message:
                self.failures.append(f"{search.task.name}: {message}")
            self.measured += typical_seconds(seconds) < math.inf
        self.progress(search.task.name, len(candidates))


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
