"""Finding the tuning record for a kernel: which logs serve a target, and which of their records is nearest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import tvm
from tvm import tirx
from tvm.target import Target

from ..errors import LogError
from ..schedules.knobs import Knobs, knob_values, knobs_at, rule_of
from .device_identity import arch_of, cpu_levels, device_slug, same_arch, slug_of
from .kernel_hash import kernel_hash
from .kernel_shape import KernelShape
from .log_document import MalformedLogError
from .log_folders import MANIFEST_FILE, is_log, log_folders, log_roots
from .log_store import LogEntry, TuningLog, read_log
from .shape_buckets import Bucket, WantedSizes, bucket_distance, bucket_label, nearest_batches
from .trace_document import traced_knobs

FAR = 8.0
"""Doublings (of heads) beyond which a record says nothing about a kernel."""


@dataclass(frozen=True)
class Match:
    """A record for a kernel.

    knobs  to build the kernel with; none if the record says that the rule's own are best. exact  it was made for this
    very kernel, the bucket apart. stale  the kernel's code has changed since. source  where it comes from, in words.
    beside  records of other sizes, for knobs that do not matter at this one's; ``knobs`` has theirs too.
    """

    entry: LogEntry
    log: TuningLog
    knobs: Knobs
    exact: bool
    stale: bool
    beside: tuple[Match, ...] = ()

    @property
    def source(self) -> str:
        """Folder, what was tuned at which sizes, and what was chosen."""
        if self.beside:
            one = replace(self, beside=(), knobs=self.entry.record.knobs)
            return "; ".join(match.source for match in (one, *self.beside))
        record = self.entry.record
        chosen = ", ".join(f"{name}={value}" for name, value in self.knobs.items()) or "the rule's own knobs"
        notes = [*([] if self.exact else [f"tuned for {record.shape.label}"]), *(["stale"] if self.stale else [])]
        remark = f" ({', '.join(notes)})" if notes else ""
        return f"{self.log.slug}, {bucket_label(record.bucket)}{remark}: {chosen}"


@dataclass
class TuningRecords:
    """The records that serve a target.

    ``given``: a root of log folders, or one of them, looked into before the user's and the packaged logs. ``warnings``
    collects what could not be used. Raises ``LogError`` for a ``given`` folder without a log.
    """

    target: Target
    given: Path | None = None
    warnings: list[str] = field(default_factory=list)
    _logs: list[tuple[int, TuningLog]] | None = None

    def __post_init__(self) -> None:
        self._roots = log_roots(self.given)

    @property
    def logs(self) -> list[TuningLog]:
        """The logs that serve the target, best first."""
        return [log for _, log in self._ranked()]

    def lookup(self, func: tirx.PrimFunc, wanted: WantedSizes | None = None) -> Match | None:
        """The record for a definition: of the same kernel if there is one, in the order of logs, else the nearest.

        Of one kernel's records the one whose bucket is nearest to the ``wanted`` sizes counts.
        """
        shape, rule = KernelShape.of(func), rule_of(func, self.target)
        if shape is None or rule is None or not knob_values(rule):
            return None
        sizes, decides = (wanted or WantedSizes()).sizes(), knobs_at(rule)
        match = self._match(self._nearest(shape, rule.__name__, sizes), func)
        if match is None or decides is None:
            return match
        first = decides(match.entry.record.bucket)
        records = [entry.record for log in self.logs for entry in log.entries]
        others = {decides(record.bucket) for record in records if record.rule == rule.__name__} - {first}
        beside = [self._match(self._nearest(shape, rule.__name__, sizes, decides, names), func) for names in others]
        exact = tuple(other for other in beside if other is not None and other.exact and match.exact)
        knobs = {name: value for each in (*exact, match) for name, value in each.knobs.items()}
        return replace(match, knobs=knobs, beside=exact, stale=any(each.stale for each in (match, *exact)))

    def at_other_sizes(self, func: tirx.PrimFunc, match: Match, wanted: WantedSizes) -> list[Match]:
        """``match`` and its device's records of the same kernel as its own that other numbers of tokens may want.

        Of other numbers of sequences too, where these are not known; of one size the record that comes first in the
        order of logs.
        """
        shape, rule = KernelShape.of(func), rule_of(func, self.target)
        if shape is None or rule is None or match.beside:
            return [match]
        tuned = match.entry.record.shape
        far = shape.distance(tuned)
        if far is None:
            return [match]
        first = {tuple(sorted(match.entry.record.bucket.items())): (match.log, match.entry)}
        for log in self.logs:
            for entry in log.entries if log.slug == match.log.slug else ():
                if entry.record.rule == rule.__name__ and tuned.distance(entry.record.shape) == 0:
                    first.setdefault(tuple(sorted(entry.record.bucket.items())), (log, entry))
        near = nearest_batches([dict(entry.record.bucket) for _, entry in first.values()], wanted.batch)
        chosen = [(log, entry) for log, entry in first.values() if dict(entry.record.bucket) in near]
        others = [self._match((far, log, entry), func) for log, entry in chosen if entry is not match.entry]
        return [match, *(each for each in others if each is not None)]

    def _match(self, found: tuple[float, TuningLog, LogEntry] | None, func: tirx.PrimFunc) -> Match | None:
        """What was found, for a definition."""
        rule = rule_of(func, self.target)
        if found is None or rule is None:
            return None
        far, log, entry = found
        stale = entry.record.kernel_hash != kernel_hash(rule)
        knobs = self._knobs(log, entry)
        return None if knobs is None else Match(entry, log, knobs, far == 0, stale)

    def _nearest(
        self,
        shape: KernelShape,
        rule: str,
        sizes: Bucket,
        decides: Callable[[Bucket], tuple[str, ...]] | None = None,
        names: tuple[str, ...] = (),
    ) -> tuple[float, TuningLog, LogEntry] | None:
        """The record of a rule that is nearest to a kernel and sizes, and how far its kernel is.

        With ``decides``, of the records at whose sizes the knobs ``names`` matter.
        """
        found: list[tuple[tuple[float, ...], int, TuningLog, LogEntry]] = []
        for rank, log in self._ranked():
            for entry in log.entries:
                if decides is not None and decides(dict(entry.record.bucket)) != names:
                    continue
                far = shape.distance(entry.record.shape)
                if far is not None and far <= FAR and entry.record.rule == rule:
                    near = (far > 0, 0 if far else rank, far, bucket_distance(entry.record.bucket, sizes))
                    found.append((near, len(found), log, entry))
        if not found:
            return None
        nearest, _, log, entry = min(found, key=lambda item: item[:2])
        return nearest[2], log, entry

    def _knobs(self, log: TuningLog, entry: LogEntry) -> Knobs | None:
        """The knobs that the record's trace chooses."""
        try:
            return traced_knobs(entry.tuning_record)
        except MalformedLogError as error:
            self.warnings.append(f"a record of {entry.record.operator} in {log.path} cannot be read: {error}")
            return None

    def _ranked(self) -> list[tuple[int, TuningLog]]:
        if self._logs is None:
            self._logs = list(self._serving())
        return self._logs

    def _serving(self) -> Iterator[tuple[int, TuningLog]]:
        for root_rank, root in enumerate(self._roots):
            ranked = []
            for folder in log_folders(root):
                try:
                    log = _cached_log(folder, (folder / MANIFEST_FILE).stat().st_mtime_ns)
                except (LogError, OSError) as error:
                    self.warnings.append(str(error))
                    continue
                rank = log_rank(log, self.target)
                if rank is None and is_log(root) and log.device["kind"] == self.target.kind.name:
                    self.warnings.append(f"{folder} is of another device, {log.device['name']}")
                    rank = 0  # it was named itself
                if rank is not None:
                    ranked.append((rank, log))
            for rank, log in sorted(ranked, key=lambda pair: pair[0]):
                yield 100 * root_rank + rank, log


@lru_cache(maxsize=64)
def _cached_log(folder: Path, _changed: int) -> TuningLog:
    return read_log(folder)


def log_rank(log: TuningLog, target: Target) -> int | None:
    """How well a log's device serves a target, 0 the best; None if it does not.

    CPUs are served by the logs of their level and of those below it, made with up to twice or half as many threads.
    GPUs by their own, which the device at hand or the target's tag names, and by others of the same architecture.
    """
    if log.device["kind"] != target.kind.name:
        return None
    if target.kind.name != "cuda":
        levels, threads = cpu_levels(target), int(tvm.runtime.num_threads())
        tuned_with = int(log.device["attributes"].get("threads", threads))
        alike = log.device["arch"] in levels and max(threads, tuned_with) <= 2 * min(threads, tuned_with)
        return levels.index(log.device["arch"]) if alike else None
    if not same_arch(str(log.device["arch"]), arch_of(target)):
        return None
    tag = slug_of(str(getattr(target, "tag", "") or ""))
    named = [name for name in (device_slug(target), tag.removeprefix("nvidia-") if tag else None) if name]
    return 0 if any(log.slug == name or log.slug.startswith(name) for name in named) else 1
