"""Tune tasks for one device with MetaSchedule, and write its log."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import tvm

from ..errors import DeviceError, UsageError
from ..formats import VERSION as LAYOUT_VERSION
from .device_identity import DeviceIdentity, slug_of
from .kernel_runner import MeasuringProcess
from .kernel_timer import Timing
from .knob_search import KnobSearch
from .log_folders import MANIFEST_FILE
from .log_store import LogRecord, TuningLog, finish_write, read_log, write_log
from .progress import Progress
from .remote_measuring import RemoteDevice
from .roofline import Roofline
from .search_run import SearchRun
from .trial_files import TrialFiles, open_trials
from .trials import FOLDER, best_entry, trials_of
from .tuning_task import TuningTask

DEFAULT_TRIALS = 16
MOST_WORKERS = 16


@dataclass(frozen=True)
class TuningOptions:
    """How to tune.

    trials_per_task  candidates of one task, those of earlier runs counted. trials  of all tasks in this run, None
    for as many as there are. time_budget  seconds of this run, None for no end. early_stopping  end a task after so
    many without a new best, 0 for never. timing  of a measurement. timeout  seconds for compiling a candidate, and for
    measuring one. parallel  compiling processes. remote  a device to measure on instead of the one at hand. seed  of
    the order of candidates.
    """

    trials_per_task: int = DEFAULT_TRIALS
    trials: int | None = None
    time_budget: float | None = None
    early_stopping: int = 0
    timing: Timing = field(default_factory=Timing)
    timeout: float = 60.0
    parallel: int = field(default_factory=lambda: max(1, min(MOST_WORKERS, os.cpu_count() or 1)))
    remote: RemoteDevice | None = None
    seed: int = 0


@dataclass(frozen=True)
class TuningResult:
    """What a run gave: the log's ``folder``, the ``records`` of its tasks, and ``failures`` (candidate and reason).

    ``finished``: every task has had all its trials; else the same call goes on.
    """

    folder: Path
    device: DeviceIdentity
    records: tuple[LogRecord, ...]
    failures: tuple[str, ...]
    measured: int
    finished: bool = True


def tune(
    tasks: Sequence[TuningTask],
    root: Path,
    options: TuningOptions | None = None,
    progress: Progress = lambda _step: None,
) -> TuningResult:
    """Tune tasks of one target and merge what is best into the log of its device, a folder in ``root``.

    A run that is interrupted, killed or out of time or disk leaves a log of what it had measured, or trials that the
    same call makes a log of: it goes on from there. Raises ``DeviceError`` if the device cannot be used, ``UsageError``
    for a folder that cannot be written or is in use, ``LogError`` for one that holds a damaged log.
    """
    options = options or TuningOptions()
    if not tasks:
        raise UsageError("there is nothing to tune: none of the kernels has knobs")
    target = tasks[0].target
    device = _identity(target, options.remote)
    folder = root / device.slug
    with open_trials(folder / FOLDER) as files, tempfile.TemporaryDirectory(prefix="tvmc-tune-") as scratch:
        finish_write(folder)
        log = _begun_log(folder, device, target)
        searches = [KnobSearch(task, options.trials_per_task, options.early_stopping, options.seed) for task in tasks]
        for search in searches:
            search.recall(files)
        searches = [search for search in searches if search.unfinished()]
        process = MeasuringProcess(target, Path(scratch), options.timing, options.timeout, options.remote)
        run = SearchRun(
            searches,
            files,
            process,
            Path(scratch),
            parallel=options.parallel,
            timeout=options.timeout,
            progress=progress,
            budget=options.time_budget,
        )
        try:
            if searches:
                run.run(options.trials, options.seed)
        except BaseException:
            with suppress(UsageError):  # a full disk: the trials are there
                _write(tasks, folder, log, process.roofline, files)
            raise
        records = _write(tasks, folder, log, process.roofline, files)
    if not records and not run.out_of_time:
        reason = run.failures[0] if run.failures else "none was built"
        raise DeviceError(f"no candidate could be measured: {reason}")
    finished = not run.out_of_time and not any(search.unfinished() for search in searches)
    return TuningResult(folder, device, records, tuple(run.failures), run.measured, finished)


def _identity(target: tvm.target.Target, remote: RemoteDevice | None) -> DeviceIdentity:
    if remote is None:
        return DeviceIdentity.of(target)
    remote.check()
    if target.kind.name != "cuda":
        return replace(DeviceIdentity.of(target), name=f"a CPU at {remote.key}")
    name = remote.device_name()
    return DeviceIdentity(slug_of(name), name, "cuda", str(target.attrs.get("arch", "")))


def _begun_log(folder: Path, device: DeviceIdentity, target: tvm.target.Target) -> TuningLog:
    """The log in a folder, or an empty one."""
    document = json.loads(str(target))
    log = TuningLog(device.document(), document, tvm.__version__, LAYOUT_VERSION, None)
    if not (folder / MANIFEST_FILE).exists():
        return log
    old = read_log(folder)
    return replace(log, entries=old.entries, copy_bandwidth=old.copy_bandwidth, product_rate=old.product_rate)


def _write(
    tasks: Sequence[TuningTask], folder: Path, log: TuningLog, found: Roofline, files: TrialFiles
) -> tuple[LogRecord, ...]:
    """Merge the best of every task into a log and write it; returns their records."""
    roofline = Roofline(found.bandwidth or log.copy_bandwidth, found.product_rate or log.product_rate)
    log = replace(log, copy_bandwidth=roofline.bandwidth, product_rate=roofline.product_rate)
    best = [best_entry(task, trials_of(task, files), roofline) for task in tasks]
    entries = [entry for entry in best if entry is not None]
    if not entries:
        return ()
    log = log.merged(entries)
    write_log(folder, log)
    kept = {record.key: record for record in log.records}
    return tuple(kept[entry.record.key] for entry in entries)
