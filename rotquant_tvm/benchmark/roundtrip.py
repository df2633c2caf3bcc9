"""Stage 1 alone: normalized vectors in, quantized and reconstructed vectors out, as IsoQuant's benchmark has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rotquant_tvm.errors import UsageError
from rotquant_tvm.formats import HEAD_DIMS, Codec, KVFormat
from rotquant_tvm.formats.rotation import rotation_families

from .code_error import roundtrip_error
from .contender import Contender
from .device import BenchmarkDevice, open_device
from .kernels import Operator, OperatorLibrary
from .peers import Peers
from .report import Report, Rival, Row
from .settings import Settings, count

CHECKED = 512
"""How many vectors are compared with the reference."""


@dataclass(frozen=True)
class Case:
    """One setting: so many vectors of a format, head dimension and dtype."""

    vectors: int
    head_dim: int
    rotation: str
    bits: int
    dtype: str

    @property
    def name(self) -> str:
        """``8K x 128 float16``."""
        return f"{count(self.vectors)} x {self.head_dim} {self.dtype}"

    @property
    def format(self) -> KVFormat:
        """The format; raises ``FormatError`` if there is none of these bits, ``UsageError`` for an unknown rotation."""
        family = rotation_families().get(self.rotation)
        if family is None or not family.spelling:
            raise UsageError(f"unknown rotation '{self.rotation}'; known: {', '.join(rotation_families())}")
        return KVFormat.parse(family.spelling.format(bits=self.bits))

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        return 2 * self.vectors * self.head_dim * np.dtype(self.dtype).itemsize


def run(settings: Settings) -> Report:
    """Race round trips; raises ``UsageError`` or ``DeviceError`` before anything runs."""
    cases = [
        Case(vectors, head_dim, rotation, bits, dtype)
        for vectors, head_dim in settings.vector_cases()
        for dtype in settings.dtypes
        for rotation in settings.rotations
        for bits in settings.bits
    ]
    names = [case.format.name for case in cases]
    if not any(case.head_dim in HEAD_DIMS for case in cases):
        cases[0].format.check(cases[0].head_dim)
    device = open_device(settings.target, settings.samples)
    peers = None
    if settings.peers is not None:
        if device.target.kind.name != "cuda":
            raise UsageError("--peers races CUDA kernels; use it with --target cuda")
        settings.progress("build the peers' kernels")
        peers = Peers(settings.peers, device)
    operators = OperatorLibrary(device.target)
    report = Report("roundtrip", device.name, device.bandwidth(), "")
    for case, name in zip(cases, names, strict=True):
        settings.progress(f"roundtrip {case.name} {name}")
        report.rows.append(_race(device, operators, peers, case, 1 if settings.warm else device.sets(case.nbytes)))
        device.free()
    report.notes += peers.notes if peers is not None else []
    if settings.warm:
        report.notes.append("the same vectors again and again: the device's cache keeps what fits")
    report.clock = ", ".join(sorted(device.timer.clocks))
    return report


def _race(device: BenchmarkDevice, operators: OperatorLibrary, peers: Peers | None, case: Case, buffers: int) -> Row:
    subject = case.format.name
    try:
        codec = case.format.codec(case.head_dim)
        operator = operators.roundtrip(codec, case.dtype)
    except Exception as failed:  # one setting's failure is a row of the table, not its end
        return Row.without_time(case.name, subject, failed)
    sets = [_vectors(device, case) for _ in range(buffers)]
    contenders = [_ours(device, operator, codec, case, sets)]
    if peers is not None:
        contenders += peers.contenders(case.rotation, codec, sets)
    outcomes = device.race(contenders)
    ours = outcomes.pop(subject)
    rivals = tuple(Rival(name, outcome.seconds, outcome.note) for name, outcome in outcomes.items())
    error = None
    if ours.seconds is not None:
        contenders[0].calls[0]()  # the set's output may be a rival's by now
        x, y = (device.numpy(array, slice(0, CHECKED)) for array in sets[0])
        error = roundtrip_error(codec, x.astype(np.float64), y)
    return Row(case.name, subject, ours.seconds, case.nbytes, "copy", rivals, error, operator.label, note=ours.note)


def _vectors(device: BenchmarkDevice, case: Case) -> tuple[Any, Any]:
    """Unit vectors [n, d] and room for as many."""
    x = device.normal((case.vectors, case.head_dim), "float32")
    x /= (x * x).sum(-1)[:, None] ** 0.5
    return device.argument(device.cast(x, case.dtype)), device.empty((case.vectors, case.head_dim), case.dtype)


def _ours(
    device: BenchmarkDevice, operator: Operator, codec: Codec, case: Case, sets: list[tuple[Any, Any]]
) -> Contender:
    rotations = [device.coefficients(data) for data in (codec.coefficients, codec.inverse_coefficients)]
    shape = (1, 1, case.vectors, case.head_dim)
    calls = []
    for x, y in sets:
        arrays = [device.reshape(array, shape) for array in (x, y)]
        calls.append(lambda arrays=arrays: operator.run(arrays[0], *rotations, arrays[1]))
    return Contender(case.format.name, calls, [y for _, y in sets])
