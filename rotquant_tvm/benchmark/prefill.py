"""Prefill attention of a causal chunk, with the flush to codes beside it, against 16-bit caches and other libraries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rotquant_tvm.formats import Rotation
from rotquant_tvm.ops.rotation_matrices import rotation_arguments
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
        site = self.spec.site(settings, chunk=True)
        self.site = operators.rotating_prefill(site) or site
        self._attend = operators.attention(self.site, WantedSizes(shape.batch, shape.tokens))
        self.kernel = self._attend.label
        self._arrays, self._k, self._v = self._append.random()
        rows = (shape.batch, shape.tokens, settings.heads, settings.head_dim)
        self._q = device.argument(device.normal(rows, settings.dtype))
        self._out = device.empty(rows, settings.dtype)
        k, v = self.spec.codecs
        own = [] if self.site.rotated else [k.rotation, k.rotation, v.rotation, v.inverse_rotation]
        sizes = rows, self._k.shape, self._v.shape, rows
        self._turns = [
            _Turn(device, operators, rotation, settings.dtype, size)
            for rotation, size in zip(own, sizes, strict=False)
        ]
        turned = [c.rotation for c in (k, v)]
        matrices = rotation_arguments((k, v), turned, settings.dtype) if self.site.rotated else []
        self._matrices = [device.argument(device.native(matrix)) for matrix in matrices]
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
        turned = [turn.result(x) for turn, x in zip(self._turns[1:3], (self._k, self._v), strict=False)]
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
        operands = [self._q, self._k, self._v]
        output = self._out
        if self._turns:
            operands = [turn.run(x) for turn, x in zip(self._turns[:3], operands, strict=True)]
            output = self._turns[3].source(self._out)
        self._attend.run(*operands, *self._arrays, *self._counts, *self._matrices, output)
        if self._turns:
            self._turns[3].run(output, self._out)


class _Turn:
    """A rotation of an attention's operand or output by a launch of its own, where it is none that changes nothing."""

    def __init__(
        self,
        device: BenchmarkDevice,
        operators: OperatorLibrary,
        rotation: Rotation,
        dtype: str,
        size: tuple[int, ...],
    ) -> None:
        self._rotate = operators.rotate(rotation, dtype)
        if self._rotate is not None:
            self._coefficients, self._buffer = device.coefficients(rotation.data), device.empty(size, dtype)

    def result(self, x: Any) -> Any:
        """Where ``run(x)`` leaves what it makes of x."""
        return x if self._rotate is None else self._buffer

    source = result
    """Where an operator puts what is to be turned into x."""

    def run(self, x: Any, target: Any = None) -> Any:
        """Rotate x, into a buffer of this object's where no target is given; returns the result."""
        target = self.result(x) if target is None else target
        if self._rotate is not None:
            self._rotate.run(x, self._coefficients, target)
        return target
