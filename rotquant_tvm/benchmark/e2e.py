"""A whole model on CUDA: decode steps as CUDA graphs, prompts, and how much fits; beside it our f16 cache and torch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from rotquant_tvm.errors import DeviceError, UsageError
from rotquant_tvm.runtime import CompiledLibrary

from .contender import failure
from .decode import F16
from .device import open_device
from .e2e_model import BenchmarkModel, ModelShape
from .e2e_step import (
    FREE_BYTES,
    ROOM,
    context,
    decode_seconds,
    filled_session,
    largest_batch,
    prefill_seconds,
    timed,
)
from .e2e_torch import TorchModel
from .report import Report, Rival, Row
from .settings import BatchShape, Settings, count

TORCH = "torch"
MOST_PROMPT = 1 << 16
"""Tokens of all sequences together up to which prompts are timed."""
TRIES = 5
"""How often a step is tried with fewer sequences, 5 % less each time, or one."""


def run(settings: Settings, shape: ModelShape | None = None) -> Report:
    """Measure the model's steps and prompts; raises ``UsageError`` or ``DeviceError`` before anything runs."""
    if settings.target.strip().startswith("llvm"):
        raise UsageError("bench e2e measures on CUDA; examples/measure_cpu.py measures a model on a CPU")
    device = open_device(settings.target, settings.samples)
    report = Report("e2e", device.name, device.bandwidth(), "CUDA events")
    settings.progress("e2e: import the model")
    model = BenchmarkModel(shape or ModelShape(), device.target)
    libraries: dict[str, CompiledLibrary | Exception] = {}
    for name in dict.fromkeys([F16, *settings.kv_caches]):
        settings.progress(f"e2e: compile {name}")
        libraries[name] = _attempt(partial(_library, model, name))
    for case in settings.shapes:
        report.rows += _decode(model, libraries, settings, case)
        if case.batch * case.tokens <= MOST_PROMPT:
            report.rows += _prefill(model, libraries, settings, case)
        device.free()
    report.notes.append(f"{model.shape.name}: {model.weight_bytes / 1e9:.2f} GB of weights, random")
    for tokens in sorted({case.tokens for case in settings.shapes}):
        report.notes += _capacities(libraries, settings, tokens)
    return report


def _library(model: BenchmarkModel, kv_cache: str) -> CompiledLibrary:
    return model.compiled(kv_cache).library("cuda", model.weights)


def _decode(model: BenchmarkModel, libraries: dict[str, Any], settings: Settings, shape: BatchShape) -> list[Row]:
    case = f"{shape.name} decode"
    settings.progress(f"e2e: {case} {TORCH}")
    seconds = {TORCH: _attempt(lambda: _torch_decode(model, shape, settings.samples))}
    nbytes = {}
    for name, library in libraries.items():
        settings.progress(f"e2e: {case} {name}")
        if isinstance(library, CompiledLibrary):
            read = library.info.bytes_per_token * context(library, shape) * shape.batch
            nbytes[name] = int(model.step_bytes(shape.batch) + read)
        seconds[name] = _attempt(partial(_our_decode, library, shape, settings.samples))
    return _rows(case, seconds, nbytes)


def _prefill(model: BenchmarkModel, libraries: dict[str, Any], settings: Settings, shape: BatchShape) -> list[Row]:
    case = f"{shape.name} prefill"
    samples = max(2, settings.samples // 4)
    settings.progress(f"e2e: {case} {TORCH}")
    seconds = {TORCH: _attempt(lambda: _torch_prefill(model, shape, samples))}
    for name, library in libraries.items():
        settings.progress(f"e2e: {case} {name}")
        seconds[name] = _attempt(partial(_our_prefill, library, shape, samples))
    rows = shape.batch * shape.tokens
    sizes = model.shape
    attention = 2.0 * rows * shape.tokens * sizes.heads * sizes.head_dim * sizes.layers
    flops = model.flops(rows, shape.batch) + attention
    return _rows(case, seconds, {}, lambda time: f"{flops / time / 1e12:.0f} TFLOP/s, {rows / time:,.0f} tokens/s")


def _rows(
    case: str,
    seconds: dict[str, Any],
    nbytes: dict[str, int],
    remark: Callable[[float], str] = lambda time: f"{1 / time:.1f} steps/s",
) -> list[Row]:
    """A row per cache, with our own f16 cache and torch as its rivals."""
    others = {f"our {F16}": seconds[F16], TORCH: seconds[TORCH]}
    rivals = [
        Rival(name, time, nbytes=nbytes.get(F16)) if isinstance(time, float) else Rival(name, None, failure(time).note)
        for name, time in others.items()
    ]
    rows = []
    for name, time in seconds.items():
        if name == TORCH:
            continue
        beside = tuple(rival for rival in rivals if name != F16 or rival.name == TORCH)
        if isinstance(time, float):
            bound: Literal["read"] | None = "read" if name in nbytes else None
            rows.append(Row(case, name, time, nbytes.get(name, 0), bound, beside, note=remark(time)))
        elif isinstance(time, NoRoom):
            rows.append(Row(case, name, None, 0, None, beside, note=str(time), refused=True))
        else:
            rows.append(Row.without_time(case, name, time))
    return rows


class NoRoom(DeviceError):
    """A cache is larger than the device's free memory."""


def _our_decode(library: Any, shape: BatchShape, samples: int) -> float:
    library = _whole(library)
    needed = library.info.cache_bytes(shape.batch, context(library, shape) + ROOM)
    if needed > _free_bytes() - FREE_BYTES:
        raise NoRoom(f"no room: the cache takes {needed / 1e9:.1f} GB, {_free_bytes() / 1e9:.1f} GB are free")
    return decode_seconds(filled_session(library, shape), samples)


def _our_prefill(library: Any, shape: BatchShape, samples: int) -> float:
    return prefill_seconds(_whole(library), shape, samples)


def _torch_decode(model: BenchmarkModel, shape: BatchShape, samples: int) -> float:
    """Median seconds of torch's step, as replays of a CUDA graph."""
    import statistics

    import torch

    needed = 2 * 2 * shape.batch * shape.tokens * model.shape.layers * model.shape.kv_heads * model.shape.head_dim
    if needed > _free_bytes() - FREE_BYTES:
        raise NoRoom(f"no room: the cache takes {needed / 1e9:.1f} GB, {_free_bytes() / 1e9:.1f} GB are free")
    ours = TorchModel(model, shape.batch, shape.tokens)
    ids = torch.zeros((shape.batch, 1), dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        ours.decode(ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.decode(ids)
    timed(graph.replay)
    return statistics.median(timed(graph.replay) for _ in range(samples))


def _torch_prefill(model: BenchmarkModel, shape: BatchShape, samples: int) -> float:
    import statistics

    import torch

    ours = TorchModel(model, shape.batch, shape.tokens)
    ids = torch.randint(0, model.shape.vocabulary, (shape.batch, shape.tokens), device="cuda")
    timed(lambda: ours.prefill(ids))
    return statistics.median(timed(lambda: ours.prefill(ids)) for _ in range(samples))


def _capacities(libraries: dict[str, Any], settings: Settings, tokens: int) -> list[str]:
    """How many sequences of a length fit with each cache: computed from the bytes, and tried with a decode step."""
    lines = []
    for name, library in libraries.items():
        if not isinstance(library, CompiledLibrary):
            continue
        _collect()
        batch = largest_batch(library, min(tokens, library.info.max_position), _free_bytes())
        settings.progress(f"e2e: largest batch of {count(tokens)}, {name}")
        result = _largest_that_runs(batch, partial(_one_step, library, tokens))
        lines.append(f"{count(tokens)} tokens, {name}: {batch} sequences fit by their bytes ({result})")
    return lines


def _largest_that_runs(batch: int, step: Callable[[int], None]) -> str:
    """Try a step of so many sequences, then of fewer: many short ones leave activations less room than they take."""
    if not batch:
        return "no room"
    note = ""
    for number in range(TRIES):
        size = batch - max(number, batch * number // 20)
        if not size:
            break
        error = _attempt(partial(step, size))
        if error is None:
            return "ran" if size == batch else f"{size} ran"
        note = failure(error).note
        del error  # it holds the session, whose memory the next one needs
        _collect()
    return note


def _one_step(library: CompiledLibrary, tokens: int, batch: int) -> None:
    import numpy as np

    shape = BatchShape(batch, tokens)
    tokens = context(library, shape)
    session = library.session(shape.batch, min(shape.tokens, library.info.max_position))
    session.cache.assume(np.full(shape.batch, min(tokens, session.capacity - 1)))
    session.decode(np.zeros(shape.batch, np.int64))


def _whole(library: Any) -> CompiledLibrary:
    if isinstance(library, Exception):
        raise library
    whole: CompiledLibrary = library
    return whole


def _attempt(call: Callable[[], Any]) -> Any:
    """What a call returns, or the error that it raises: one configuration's failure is a row, not the end."""
    try:
        return call()
    except Exception as error:
        return error
    finally:
        _collect()


def _collect() -> None:
    """Give memory back that nothing uses any more."""
    import torch
    import tvm

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    clear = tvm.get_global_func("vm.builtin.memory_manager.clear", allow_missing=True)
    if clear is not None:
        clear()


def _free_bytes() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])
