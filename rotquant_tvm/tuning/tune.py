"""Tune tasks for one device with MetaSchedule, and write its log."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tvm

from ..errors import DeviceError, UsageError
from ..formats import VERSION as LAYOUT_VERSION
from .device_identity import DeviceIdentity, slug_of
from .kernel_runner import MeasuringProcess
from .kernel_timer import Timing
from .knob_search import KnobSearch
from .log_folders import MANIFEST_FILE
from .log_store import LogRecord, TuningLog, read_log, write_log
from .remote_measuring import RemoteDevice
from .search_run import Progress, SearchRun
from .trials import FOLDER, best_entry, open_trials, trials_of
from .tuning_task import TuningTask

DEFAULT_TRIALS = 16
MOST_WORKERS = 16

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
    ``DeviceError`` if the device cannot be used, ``UsageError`` for a folder that cannot be written, is in use or holds
    a damaged log.
    """
    options = options or TuningOptions()
    if not tasks:
        raise UsageError("there is nothing to tune: none of the kernels has knobs")
    target = tasks[0].target
    device = _identity(target, options.remote)
    folder = root / device.slug
    log = _begun_log(folder, device, target)
    with open_trials(folder / FOLDER) as database, tempfile.TemporaryDirectory(prefix="tvmc-tune-") as scratch:
        searches = [KnobSearch(task, options.trials_per_task, options.early_stopping, options.seed) for task in tasks]
        for search in searches:
            search.recall(database)
        searches = [search for search in searches if search.unfinished()]
        process = MeasuringProcess(target, Path(scratch), options.timing, options.timeout, options.remote)
        run = SearchRun(
            searches,
            database,
            process,
            Path(scratch),
            parallel=options.parallel,
            timeout=options.timeout,
            progress=progress,
        )
        try:
            if searches:
                run.run(options.trials, options.seed)
        finally:
            records = _write(tasks, folder, log, process.bandwidth, database)
    if not records:
        reason = run.failures[0] if run.failures else "none was built"
        raise DeviceError(f"no candidate could be measured: {reason}")
    return TuningResult(folder, device, records, tuple(run.failures), run.measured)


def _identity(target: tvm.target.Target, remote: RemoteDevice | None) -> DeviceIdentity:
    if remote is None:
        return DeviceIdentity.of(target)
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
    return replace(log, entries=old.entries, copy_bandwidth=old.copy_bandwidth)


def _write(
    tasks: Sequence[TuningTask], folder: Path, log: TuningLog, bandwidth: float | None, database: Any
) -> tuple[LogRecord, ...]:
    """Merge the best of every task into a log and write it; returns their records."""
    log = replace(log, copy_bandwidth=bandwidth or log.copy_bandwidth)
    found = [best_entry(task, trials_of(task, database), log.copy_bandwidth) for task in tasks]
    entries = [entry for entry in found if entry is not None]
    if not entries:
        return ()
    log = log.merged(entries)
    write_log(folder, log)
    kept = {record.key: record for record in log.records}
    return tuple(kept[entry.record.key] for entry in entries)
