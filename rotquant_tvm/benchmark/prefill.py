"""Prefill attention of a causal chunk, with the flush to codes beside it, against 16-bit caches and other libraries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rotquant_tvm.tuning.shape_buckets import WantedSizes

from .append import AppendStep
from .cache_data import CacheSpec
from .contender import Call, Contender
from .decode import F16
from .device import BenchmarkDevice, open_device
from .kernels import OperatorLibrary
from .reference import causal_output, relative_error
from .report import Report, Rival, Row
from .rivals import prefill_rivals
from .settings import BatchShape, Settings

WHOLE = "with append"
CHECKED = 8
"""How many queries of a head are compared with float64."""


def run(settings: Settings) -> Report:
    """Race prefill attention; raises ``UsageError`` or ``DeviceError`` before anything runs."""
    device = open_device(settings.target, settings.samples)
    operators = OperatorLibrary(device.target)
    report = Report("prefill", device.name, device.bandwidth(), "")
    for shape in settings.shapes:
        report.rows += _race(device, operators, settings, shape)
        device.free()
    report.clock = ", ".join(sorted(device.timer.clocks))
    return report


def _race(device: BenchmarkDevice, operators: OperatorLibrary, settings: Settings, shape: BatchShape) -> list[Row]:
    ours: dict[str, PrefillChunk | Exception] = {}
    for name in dict.fromkeys([F16, *settings.kv_caches]):
        settings.progress(f"prefill {shape.name}: compile {name}")
        try:
            ours[name] = PrefillChunk(device, operators, settings, name, shape)
        except Exception as failed:  # one configuration's failure is a row of the table, not its end
            ours[name] = failed
    settings.progress(f"prefill {shape.name}: race")
    rivals = prefill_rivals(device, settings, shape)
    contenders = [c for name, entry in ours.items() if isinstance(entry, PrefillChunk) for c in entry.contenders(name)]
    outcomes = device.race([*contenders, *rivals.contenders])
    others = rivals.outcomes(outcomes)
    rows = []
    for name, entry in ours.items():
        if isinstance(entry, Exception):
            rows.append(Row.without_time(shape.name, name, entry))
            continue
        for label in ("", WHOLE):
            outcome, beside = outcomes[f"{name} {label}"], others
            plain = ours[F16]
            if name != F16 and isinstance(plain, PrefillChunk):
                own = outcomes[f"{F16} {label}"]
                beside = (Rival(f"our {F16}", own.seconds, own.note, plain.nbytes), *others)
            error = entry.error() if outcome.seconds is not None and not label else None
            row = Row(shape.name, f"{name} {label}".strip(), outcome.seconds, entry.nbytes, None, beside, error)
            rows.append(replace(row, kernel=entry.kernel, flops=entry.flops, note=outcome.note))
    return rows


class PrefillChunk:
    """Attention of a chunk to itself, as a compiled model runs it on an empty cache of one configuration."""

    def __init__(
        self, device: BenchmarkDevice, operators: OperatorLibrary, settings: Settings, name: str, shape: BatchShape
    ) -> None:
        self.device, self.group = device, settings.heads // settings.kv_heads
        self.spec = CacheSpec.of(name, settings, shape.batch, shape.tokens)
        self._append = AppendStep(device, operators, settings, self.spec, 0, shape.tokens)
        self.site = self.spec.site(settings, chunk=True)
        self._attend = operators.attention(self.site, WantedSizes(shape.batch, shape.tokens))
        self.kernel = self._attend.label
        k, v = self.spec.codecs
        rotations = (k.rotation, k.rotation, v.rotation, v.inverse_rotation)
        self._rotations = [operators.rotate(rotation, settings.dtype) for rotation in rotations]
        self._coefficients = [device.coefficients(rotation.data) for rotation in rotations]
        self._arrays, self._k, self._v = self._append.random()
        rows = (shape.batch, shape.tokens, settings.heads, settings.head_dim)
        self._q = device.argument(device.normal(rows, settings.dtype))
        self._rotated = [
            None if rotation is None else device.empty(size, settings.dtype)
            for rotation, size in zip(self._rotations, (rows, self._k.shape, self._v.shape, rows), strict=True)
        ]
        self._out = device.empty(rows, settings.dtype)
        counts = [np.zeros(shape.batch, np.int32)] if self.spec.policy.segmented else []
        counts += [np.full(shape.batch, shape.tokens, np.int32)] * 2
        self._counts = [device.argument(device.native(array)) for array in counts]
        self.tokens = shape.tokens
        itemsize = np.dtype(settings.dtype).itemsize
        vectors = 2 * shape.batch * shape.tokens * (settings.heads + settings.kv_heads)
        self.nbytes = vectors * settings.head_dim * itemsize + self.spec.stored_bytes([shape.tokens] * shape.batch)
        self.flops = 4.0 * shape.batch * settings.heads * settings.head_dim * shape.tokens * (shape.tokens + 1) / 2

    def contenders(self, name: str) -> list[Contender]:
        """The attention with its rotations, alone and together with what appends the chunk to the cache."""
        turned = [
            self._rotated[1] if self._rotations[1] else self._k,
            self._rotated[2] if self._rotations[2] else self._v,
        ]
        append = self._append.call(self._arrays, self._k, self._v, turned)

        def whole() -> None:
            if self.spec.policy.segmented:
                self._attention()
                append()
            else:
                append()
                self._attention()

        calls: dict[str, Call] = {"": self._attention, WHOLE: whole}
        return [Contender(f"{name} {label}", [call], [self._out]) for label, call in calls.items()]

    def error(self) -> float:
        """The relative error of some queries of the last head of the last sequence."""
        self._attention()
        picked = np.unique(np.linspace(0, self.tokens - 1, CHECKED).astype(int)).tolist()
        b, head = self.spec.batch - 1, self.spec.kv_heads * self.group - 1
        rows = (b, picked, head)
        k, v = (self.device.numpy(x, (b, self.spec.kv_heads - 1)) for x in (self._k, self._v))
        expected = causal_output(self.device.numpy(self._q, rows), k, v, picked, self.site.scale)
        return relative_error(self.device.numpy(self._out, rows), expected)

    def _attention(self) -> None:
        q, k, v = (self._turned(index, x) for index, x in enumerate((self._q, self._k, self._v)))
        last = self._rotated[3]
        output: Any = self._out if last is None else last
        self._attend.run(q, k, v, *self._arrays, *self._counts, output)
        if self._rotations[3] is not None:
            self._rotations[3].run(output, self._coefficients[3], self._out)

    def _turned(self, index: int, x: Any) -> Any:
        rotation = self._rotations[index]
        if rotation is None:
            return x
        rotation.run(x, self._coefficients[index], self._rotated[index])
        return self._rotated[index]
