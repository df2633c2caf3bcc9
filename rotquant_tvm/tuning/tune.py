"""Tune tasks for one device with MetaSchedule, and write its log."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.tune import tune_tasks

from ..errors import DeviceError, UsageError
from ..formats import VERSION as LAYOUT_VERSION
from .device_identity import DeviceIdentity, slug_of
from .kernel_builder import KernelBuilder
from .kernel_runner import KernelRunner, MeasuringProcess
from .kernel_timer import Timing
from .knob_search import KnobSearch, KnobStrategy
from .knob_space import knob_space
from .log_store import MANIFEST_FILE, LogRecord, TuningLog, read_log, write_log
from .remote_measuring import RemoteDevice
from .trials import FOLDER, best_entry, mean_seconds, open_trials, trials_of
from .tuning_task import TuningTask

DEFAULT_TRIALS = 16
MOST_WORKERS = 16
Progress = Callable[[str, int], None]
"""Told what was measured (a task's name) and how many candidates."""


@dataclass(frozen=True)
class TuningOptions:
    """How to tune.

    trials_per_task  candidates of one task, those of earlier runs counted. trials  of all tasks in this run, None
    for as many as there are. early_stopping  end a task after so many without a new best, 0 for never. timing  of a
    measurement. timeout  seconds for compiling a candidate, and for measuring one. parallel  compiling processes.
    remote  a device to measure on instead of the one at hand. seed  of the order of candidates.
    """

    trials_per_task: int = DEFAULT_TRIALS
    trials: int | None = None
    early_stopping: int = 0
    timing: Timing = field(default_factory=Timing)
    timeout: float = 60.0
    parallel: int = field(default_factory=lambda: max(1, min(MOST_WORKERS, os.cpu_count() or 1)))
    remote: RemoteDevice | None = None
    seed: int = 0


@dataclass(frozen=True)
class TuningResult:
    """What a run gave: the log's ``folder``, the ``records`` of its tasks, and ``failures`` (candidate and reason)."""

    folder: Path
    device: DeviceIdentity
    records: tuple[LogRecord, ...]
    failures: tuple[str, ...]
    measured: int


def tune(
    tasks: Sequence[TuningTask],
    root: Path,
    options: TuningOptions | None = None,
    progress: Progress = lambda _task, _count: None,
) -> TuningResult:
    """Tune tasks of one target and merge what is best into the log of its device, a folder in ``root``.

    An interrupted run leaves a log of what it had measured, and the same call goes on from there. Raises
    ``DeviceError`` if the device cannot be used, ``UsageError`` for a folder that cannot be written or is in use.
    """
    options = options or TuningOptions()
    if not tasks:
        raise UsageError("there is nothing to tune: none of the kernels has knobs")
    target = tasks[0].target
    device = _identity(target, options.remote)
    folder = root / device.slug
    with open_trials(folder / FOLDER) as database, tempfile.TemporaryDirectory(prefix="tvmc-tune-") as scratch:
        process = MeasuringProcess(target, Path(scratch), options.timing, options.timeout, options.remote)
        watch = _Watch(progress)
        searches = [KnobSearch(task, options.trials_per_task, options.early_stopping, options.seed) for task in tasks]
        for search in searches:
            search.recall(database)
        searches = [search for search in searches if search.unfinished()]
        try:
            if searches:
                watch.tasks = [search.task for search in searches]
                _run(searches, options, process, database, Path(scratch), watch)
        finally:
            process.close()
            records = _write(tasks, folder, device, process.bandwidth, database)
    if not records:
        reason = watch.failures[0] if watch.failures else "none was built"
        raise DeviceError(f"no candidate could be measured: {reason}")
    return TuningResult(folder, device, records, tuple(watch.failures), watch.measured)


def _identity(target: tvm.target.Target, remote: RemoteDevice | None) -> DeviceIdentity:
    if remote is None:
        return DeviceIdentity.of(target)
    if target.kind.name != "cuda":
        return replace(DeviceIdentity.of(target), name=f"a CPU at {remote.key}")
    name = remote.device_name()
    return DeviceIdentity(slug_of(name), name, "cuda", str(target.attrs.get("arch", "")))


def _run(
    searches: Sequence[KnobSearch],
    options: TuningOptions,
    process: MeasuringProcess,
    database: Any,
    scratch: Path,
    watch: _Watch,
) -> None:
    batch = max(1, min(options.parallel, math.ceil(0.7 * options.trials_per_task)))
    contexts = [
        ms.TuneContext(
            search.task.workload,
            target=search.task.target,
            space_generator=ms.space_generator.ScheduleFn(
                knob_space(search.task.knobs), sch_rules=[], postprocs=[], mutator_probs={}
            ),
            search_strategy=KnobStrategy(search, batch),
            task_name=search.task.name,
            rand_state=options.seed + 1,
            num_threads=1,
        )
        for search in searches
    ]
    most = len(searches) * (options.trials_per_task + 1)
    builder = KernelBuilder(scratch, options.parallel, options.timeout, portable=options.remote is not None)
    runner = KernelRunner(process)
    try:
        process.open()
        tune_tasks(
            tasks=contexts,
            task_weights=[1.0] * len(searches),
            work_dir=str(scratch),
            max_trials_global=most if options.trials is None else min(most, options.trials),
            max_trials_per_task=options.trials_per_task + 1,
            num_trials_per_iter=batch,
            builder=builder,
            runner=runner,
            database=database,
            cost_model=ms.cost_model.RandomModel(),
            measure_callbacks=[ms.measure_callback.AddToDatabase(), watch],
            task_scheduler="round-robin",
        )
    finally:
        builder.close()
        runner.close()


def _write(
    tasks: Sequence[TuningTask], folder: Path, device: DeviceIdentity, bandwidth: float | None, database: Any
) -> tuple[LogRecord, ...]:
    """Merge the best of every task into the folder's log; returns their records."""
    found = [best_entry(task, trials_of(task, database), bandwidth) for task in tasks]
    entries = [entry for entry in found if entry is not None]
    if entries:
        target = json.loads(str(tasks[0].target))
        log = TuningLog(device.document(), target, tvm.__version__, LAYOUT_VERSION, bandwidth)
        if (folder / MANIFEST_FILE).exists():
            old = read_log(folder)
            log = replace(log, entries=old.entries, copy_bandwidth=bandwidth or old.copy_bandwidth)
        write_log(folder, log.merged(entries))
    return tuple(entry.record for entry in entries)


@derived_object
class _Watch(ms.measure_callback.PyMeasureCallback):  # type: ignore[misc]
    """Tells the progress and collects what failed."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.tasks: list[TuningTask] = []
        self.progress = progress
        self.failures: list[str] = []
        self.measured = 0

    def apply(
        self, task_scheduler: Any, task_id: int, measure_candidates: Any, builder_results: Any, runner_results: Any
    ) -> None:
        """Called after every batch."""
        task = self.tasks[int(task_id)]
        for built, run in zip(builder_results, runner_results, strict=True):
            message = built.error_msg or run.error_msg
            if message:
                self.failures.append(f"{task.name}: {message}")
            elif mean_seconds(run.run_secs) < math.inf:
                self.measured += 1
        self.progress(task.name, len(measure_candidates))
