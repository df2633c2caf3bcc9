"""Decode attention over packed caches, rotations included, against attention over 16-bit caches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from rotquant_tvm.tuning.shape_buckets import WantedSizes

from .cache_data import CacheSpec
from .contender import Call, Contender
from .device import BenchmarkDevice, open_device
from .kernels import OperatorLibrary
from .reference import decode_output, packed_rows, relative_error, stored_rows
from .report import Report, Rival, Row
from .rivals import decode_rivals
from .settings import BatchShape, Settings

F16, UNTUNED = "f16", "untuned"
CHECKED = 2
"""How many (sequence, kv head) are compared with float64, at full and at ragged lengths each."""
AT_ONCE = 8
"""Of them, at most: one of 128 dims and 131,072 tokens takes a gigabyte."""


def run(settings: Settings) -> Report:
    """Race decode attention; raises ``UsageError`` or ``DeviceError`` before anything runs."""
    device = open_device(settings.target, settings.samples)
    operators = OperatorLibrary(device.target)
    report = Report("decode", device.name, device.bandwidth(), "")
    for shape in settings.shapes:
        report.rows += _race(device, operators, settings, shape)
        device.free()
    if settings.warm:
        report.notes.append("the same caches again and again: the device's cache keeps what fits")
    report.clock = ", ".join(sorted(device.timer.clocks))
    return report


def _race(device: BenchmarkDevice, operators: OperatorLibrary, settings: Settings, shape: BatchShape) -> list[Row]:
    """Our caches, our own 16-bit cache and the rivals at one shape, all in one race."""
    ours: dict[str, PackedDecode | Exception] = {}
    for name in dict.fromkeys([F16, *settings.kv_caches]):
        settings.progress(f"decode {shape.name}: compile {name}")
        try:
            ours[name] = PackedDecode(device, operators, settings, name, shape)
        except Exception as failed:  # one configuration's failure is a row of the table, not its end
            ours[name] = failed
    settings.progress(f"decode {shape.name}: race")
    rivals = decode_rivals(device, settings, shape)
    contenders = [c for name, entry in ours.items() if isinstance(entry, PackedDecode) for c in entry.contenders(name)]
    outcomes = device.race([*contenders, *rivals.contenders])
    others = rivals.outcomes(outcomes)
    settings.progress(f"decode {shape.name}: check")
    errors = _errors({name: entry for name, entry in ours.items() if name in outcomes and outcomes[name].seconds})
    plain, rows = ours[F16], []
    for name, entry in ours.items():
        if isinstance(entry, Exception):
            rows.append(Row.without_time(shape.name, name, entry))
            continue
        outcome, beside = outcomes[name], []
        untuned = outcomes.get(f"{name} {UNTUNED}")
        if untuned is not None:
            beside.append(Rival(UNTUNED, untuned.seconds, untuned.note))
        if name != F16 and isinstance(plain, PackedDecode):
            beside.append(Rival(f"our {F16}", outcomes[F16].seconds, outcomes[F16].note, plain.nbytes))
        found = (*beside, *others), errors.get(name)
        row = Row(shape.name, name, outcome.seconds, entry.nbytes, "read", *found, entry.kernel)
        rows.append(replace(row, note=outcome.note))
    return rows


def _errors(entries: Mapping[str, PackedDecode | Exception]) -> dict[str, float]:
    """The largest error of each: kernels run one after the other, what float64 takes is computed side by side."""
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        jobs = {
            name: [pool.submit(check) for check in entry.checks()]
            for name, entry in entries.items()
            if isinstance(entry, PackedDecode)
        }
        return {name: max(job.result() for job in checks) for name, checks in jobs.items()}


class PackedDecode:
    """Decode attention over sets of random caches of one configuration, as a compiled model runs it.

    A call rotates the query, attends, and un-rotates the output, in one kernel where the passes fuse these.
    """

    def __init__(
        self, device: BenchmarkDevice, operators: OperatorLibrary, settings: Settings, name: str, shape: BatchShape
    ) -> None:
        self.device, self.group = device, settings.heads // settings.kv_heads
        self.spec = CacheSpec.of(name, settings, shape.batch, shape.tokens)
        site = self.spec.site(settings, chunk=False)
        fused = operators.rotating_attention(site)
        self.site = fused or site
        wanted = WantedSizes(shape.batch, shape.tokens)
        self._attend, self._untuned = (operators.attention(self.site, wanted, tuned) for tuned in (True, False))
        k, v = self.spec.codecs
        rotations = (k.rotation, v.inverse_rotation)
        self._rotations = [None if fused else operators.rotate(rotation, settings.dtype) for rotation in rotations]
        self._coefficients = [device.coefficients(rotation.data) for rotation in rotations]
        self.kernel = self._attend.label
        full = [shape.tokens] * shape.batch
        rows = (shape.batch, 1, settings.heads, settings.head_dim)
        ends = 2 * np.prod(rows) * np.dtype(settings.dtype).itemsize
        self.nbytes = self.spec.stored_bytes(full) + int(ends)
        self._counts = self._count_arguments(full)
        self._sets = [
            (self.spec.random(device), *(self._rows(rows, settings.dtype) for _ in range(2)))
            for _ in range(1 if settings.warm else device.sets(self.nbytes))
        ]
        self._rotated, self._output = (device.empty(rows, settings.dtype) for _ in range(2))

    def contenders(self, name: str) -> list[Contender]:
        """The calls, one per set of caches; where a tuning record was used, also what the rule alone makes."""
        kernels = {name: self._attend.run}
        if self._attend.record:
            kernels[f"{name} {UNTUNED}"] = self._untuned.run
        outputs = [out for _, _, out in self._sets]
        return [
            Contender(label, [self._call(index, self._counts, run) for index in range(len(self._sets))], outputs)
            for label, run in kernels.items()
        ]

    def checks(self) -> list[Callable[[], float]]:
        """Run at full lengths and at ragged ones, tails included; each call returns the relative error of one head.

        The calls need no device.
        """
        tokens, batch = self.spec.capacity, self.spec.batch
        ragged = [max(1, tokens - 1 - 37 * b % max(1, tokens // 2)) for b in range(batch)]
        arrays, query, out = self._sets[0]
        picks = [((batch - 1) * pick, (self.spec.kv_heads - 1) * pick) for pick in range(CHECKED)]
        queries = [(b, 0, slice(head * self.group, (head + 1) * self.group)) for b, head in picks]
        runs: list[list[tuple[int, int, Any]]] = [[] for _ in picks]
        for lengths in ([tokens] * batch, ragged):
            self._call(0, self._count_arguments(lengths), self._attend.run)()
            packed = self.spec.packed(lengths)
            for run, (b, _), index in zip(runs, picks, queries, strict=True):
                run.append((lengths[b], int(packed[b]), self.device.numpy(out, index).copy()))
        return [
            partial(
                self._error, [self.device.numpy(array, pick) for array in arrays], self.device.numpy(query, index), run
            )
            for pick, index, run in zip(picks, queries, runs, strict=True)
        ]

    def _error(self, stored: list[Any], query: Any, runs: list[tuple[int, int, Any]]) -> float:
        """The largest error of some runs over one head: (length, tokens in tiles, output) of each."""
        tiles = packed_rows(self.spec, stored, max(packed for _, packed, _ in runs))
        errors = []
        for length, packed, found in runs:
            rows = stored_rows(self.spec, stored, length, packed, tiles)
            errors.append(relative_error(found, decode_output(self.spec, rows, query, self.site.scale)))
        return max(errors)

    def _call(self, index: int, counts: list[Any], attend: Callable[..., None]) -> Call:
        arrays, query, out = self._sets[index]
        before, after = self._rotations
        rotated = self._rotated if before is not None else query
        output = self._output if after is not None else out
        data = self._coefficients if self.site.rotated else []

        def call() -> None:
            if before is not None:
                before.run(query, self._coefficients[0], rotated)
            attend(rotated, *arrays, *counts, *data, output)
            if after is not None:
                after.run(output, self._coefficients[1], out)

        return call

    def _count_arguments(self, lengths: Sequence[int]) -> list[Any]:
        counts = [self.spec.packed(lengths)] if self.spec.policy.segmented else []
        counts.append(np.asarray(lengths, np.int32))
        return [self.device.argument(self.device.native(array)) for array in counts]

    def _rows(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self.device.argument(self.device.normal(shape, dtype))
