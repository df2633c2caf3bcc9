"""Quantizing and appending new tokens to packed caches: one token, or many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rotquant_tvm.formats import TOKENS, EncodedKV

from .cache_data import CacheSpec
from .code_error import code_error
from .contender import Call, Contender
from .device import BenchmarkDevice, open_device
from .kernels import OperatorLibrary
from .report import Report, Row
from .settings import BatchShape, Settings

PAST = 1000
"""Tokens that a cache holds before one more comes; not at a tile's start."""

MOST_CACHES = 64
"""A token touches little of a cache, which has to be there all the same."""

CHECKED = 256
"""How many tokens of a head are compared with the reference."""


def run(settings: Settings) -> Report:
    """Time appends; raises ``UsageError`` or ``DeviceError`` before anything runs."""
    device = open_device(settings.target, settings.samples)
    operators = OperatorLibrary(device.target)
    report = Report("append", device.name, device.bandwidth(), "")
    for shape in settings.shapes:
        for name in settings.kv_caches:
            settings.progress(f"append {shape.name} {name}")
            report.rows += _rows(device, operators, settings, name, shape)
            device.free()
    report.clock = ", ".join(sorted(device.timer.clocks))
    return report


def _rows(
    device: BenchmarkDevice, operators: OperatorLibrary, settings: Settings, name: str, shape: BatchShape
) -> list[Row]:
    """One row; two where a single token may or may not fill a block of the ring."""
    case = f"{shape.name} ({2 * shape.batch * shape.tokens * settings.kv_heads:,} vectors)"
    past = PAST if shape.tokens == 1 else 0
    try:
        spec = CacheSpec.of(name, settings, shape.batch, past + shape.tokens)
        pasts = {"": past}
        if spec.policy.block > 1 and shape.tokens == 1:
            full = spec.policy.sinks + spec.policy.recent + PAST // spec.policy.block * spec.policy.block
            pasts = {" no flush": full + 1, " flush": full - 1}
            spec = CacheSpec.of(name, settings, shape.batch, full + 2)
        steps = {
            label: AppendStep(device, operators, settings, spec, start, shape.tokens, fused=True)
            for label, start in pasts.items()
        }
    except Exception as failed:  # one configuration's failure is a row of the table, not its end
        return [Row.without_time(case, name, failed)]
    rows = []
    for label, step in steps.items():
        sets = [step.random() for _ in range(device.sets(step.nbytes, MOST_CACHES if shape.tokens == 1 else 1024))]
        outcome = device.race([Contender(name, [step.call(*one) for one in sets])])[name]
        error = step.error(*sets[0]) if outcome.seconds is not None else None
        resident = step.nbytes * len(sets) < 2 * device.cache_bytes
        note = outcome.note or ("caches stay in the device's cache" if resident else "")
        rows.append(Row(case + label, name, outcome.seconds, step.nbytes, "copy", (), error, step.kernel, note=note))
    return rows


class AppendStep:
    """The calls with which a compiled model appends ``tokens`` per sequence to caches that hold ``past``.

    ``fused``: a single token is rotated as it is appended, where the passes fuse these.
    """

    def __init__(
        self,
        device: BenchmarkDevice,
        operators: OperatorLibrary,
        settings: Settings,
        spec: CacheSpec,
        past: int,
        tokens: int,
        fused: bool = False,
    ) -> None:
        self.device, self.spec, self.tokens, self.dtype = device, spec, tokens, settings.dtype
        self._past = past
        site = spec.site(settings, chunk=tokens > 1)
        lengths = np.full(spec.batch, past + tokens, np.int32)
        new = np.full(spec.batch, tokens, np.int32)
        self._before = spec.packed([past] * spec.batch)
        self._after = spec.policy.packed_after(self._before, lengths, chunk=tokens > 1)
        counts = (self._before, self._after, lengths, new)
        self._counts = [device.argument(device.native(np.asarray(values, np.int32))) for values in counts]
        if spec.policy.segmented:
            turned = operators.rotating_rows(site) if fused and tokens == 1 else None
            rotations = [None if turned else operators.rotate(c.rotation, settings.dtype) for c in spec.codecs]
            self._coefficients = [device.coefficients(codec.rotation.data) for codec in spec.codecs]
            self._rotations, self._turning = rotations, self._coefficients if turned else []
            self._flush, self._enter = operators.flush(site, False), operators.append_plain(site, turned)
            self._rotated = [device.empty(self._shape, settings.dtype) for _ in range(2)]
            self.kernel = self._flush.label
        else:
            self._append = operators.append(site)
            self._coefficients = [device.coefficients(codec.coefficients) for codec in spec.codecs]
            self.kernel = self._append.label

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.spec.batch, self.spec.kv_heads, self.tokens, self.spec.head_dim

    @property
    def nbytes(self) -> int:
        """New keys and values read, and what they become written; a flushed block is read and written too."""
        spec, new = self.spec, int(np.prod(self._shape)) * 2
        read = new * np.dtype(self.dtype).itemsize
        if not spec.policy.segmented:
            return read + spec.batch * spec.kv_heads * self.tokens * spec.layout.tile_bytes // TOKENS
        flushed = int((self._after - self._before).sum()) * spec.kv_heads
        entered = spec.batch * spec.kv_heads * self.tokens - (flushed if self.tokens > 1 else 0)
        rows = 2 * spec.head_dim * 2
        return (
            read
            + entered * rows
            + flushed * spec.layout.tile_bytes // TOKENS
            + (flushed * rows if self.tokens == 1 else 0)
        )

    def random(self) -> tuple[list[Any], Any, Any]:
        """Arrays of a cache, and new keys and values."""
        new = [self.device.argument(self.device.normal(self._shape, self.dtype)) for _ in range(2)]
        return self.spec.random(self.device), new[0], new[1]

    def call(self, arrays: Sequence[Any], k: Any, v: Any, rotated: Sequence[Any] = ()) -> Call:
        """The calls, on raw keys and values; ``rotated``: where they are, or will be, rotated already."""
        before, after, lengths, new = self._counts
        if not self.spec.policy.segmented:
            return lambda: self._append.run(*arrays, k, v, *self._coefficients, lengths, new)

        def call() -> None:
            turned = rotated or self._rotate(k, v)
            self._flush.run(*arrays, *turned, before, after, lengths, new)
            self._enter.run(arrays[-1], *turned, *self._turning, after, lengths, new, arrays[0])

        return call

    def _rotate(self, k: Any, v: Any) -> list[Any]:
        """Keys and values in their rotated bases, in buffers that every call uses."""
        result = []
        for x, rotation, coefficients, buffer in zip(
            (k, v), self._rotations, self._coefficients, self._rotated, strict=True
        ):
            if rotation is not None:
                rotation.run(x, coefficients, buffer)
            result.append(x if rotation is None else buffer)
        return result

    def error(self, arrays: Sequence[Any], k: Any, v: Any) -> float | None:
        """The share of codes that are not the reference's, of one head; None where a policy centres or keeps tokens."""
        if self.spec.policy.segmented:
            return None
        self.call(arrays, k, v)()
        count = min(self.tokens, CHECKED)
        first, last = self._past // TOKENS, (self._past + count - 1) // TOKENS + 1
        tiles = self.device.numpy(arrays[0], (0, self.spec.kv_heads - 1, slice(first, last))).view(np.uint8)
        place = slice(self._past - first * TOKENS, self._past - first * TOKENS + count)
        errors = []
        for codec, encoded, x in zip(self.spec.codecs, self.spec.layout.unpack(tiles), (k, v), strict=True):
            vectors = self.device.numpy(x, (0, self.spec.kv_heads - 1, slice(0, count))).astype(np.float64)
            found = EncodedKV(encoded.codes.reshape(-1, self.spec.head_dim)[place], np.concatenate(encoded.gain)[place])
            errors.append(code_error(codec, vectors, found))
        return max(errors)
