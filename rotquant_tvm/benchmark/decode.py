"""Decode attention over packed caches, rotations included, against attention over 16-bit caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rotquant_tvm.tuning.shape_buckets import WantedSizes

from .cache_data import CacheSpec
from .contender import Call, Contender
from .device import BenchmarkDevice, open_device
from .kernels import OperatorLibrary
from .reference import decode_output, relative_error, stored_rows
from .report import Report, Rival, Row
from .rivals import decode_rivals
from .settings import BatchShape, Settings

F16, UNTUNED = "f16", "untuned"
CHECKED = 2
"""How many (sequence, kv head) are compared with float64, at full and at ragged lengths each."""


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
        error = entry.error() if outcome.seconds is not None else None
        row = Row(shape.name, name, outcome.seconds, entry.nbytes, "read", (*beside, *others), error, entry.kernel)
        rows.append(replace(row, note=outcome.note))
    return rows


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

    def error(self) -> float:
        """The largest relative error of a few heads at full lengths and at ragged ones, tails included."""
        tokens, batch = self.spec.capacity, self.spec.batch
        ragged = [max(1, tokens - 1 - 37 * b % max(1, tokens // 2)) for b in range(batch)]
        return max(self._error([tokens] * batch), self._error(ragged))

    def _error(self, lengths: Sequence[int]) -> float:
        self._call(0, self._count_arguments(lengths), self._attend.run)()
        arrays, query, out = self._sets[0]
        packed, errors = self.spec.packed(lengths), []
        for pick in range(CHECKED):
            b, head = (self.spec.batch - 1) * pick, (self.spec.kv_heads - 1) * pick
            stored = [self.device.numpy(array, (b, head)) for array in arrays]
            rows = stored_rows(self.spec, stored, lengths[b], int(packed[b]))
            queries = (b, 0, slice(head * self.group, (head + 1) * self.group))
            expected = decode_output(self.spec, rows, self.device.numpy(query, queries), self.site.scale)
            errors.append(relative_error(self.device.numpy(out, queries), expected))
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
