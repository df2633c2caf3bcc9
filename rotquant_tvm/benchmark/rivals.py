"""The 16-bit attention of other libraries: what packed caches must beat, at its best."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm

from .contender import Call, Contender, Outcome
from .device import BenchmarkDevice
from .library_rivals import LIBRARIES
from .report import Rival
from .settings import BatchShape, Settings

BEST = "best 16-bit"
Attend = Callable[[Any, Any, Any], Any]
Tensors = tuple[Any, Any, Any]
"""q [batch, heads, seq, d] and k, v [batch, kv_heads, tokens, d]."""


@dataclass
class Rivals:
    """Contenders that are not ours. A rival may have several forms of one computation; its best one counts.

    nbytes  what each must read and write at least.
    """

    nbytes: int
    contenders: list[Contender] = field(default_factory=list)
    forms: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, form: str, calls: Sequence[Call]) -> None:
        """Add one form of a rival."""
        label = f"{name} ({form})" if form else name
        self.contenders.append(Contender(label, calls))
        self.forms.setdefault(name, []).append(label)

    def outcomes(self, outcomes: Mapping[str, Outcome]) -> tuple[Rival, ...]:
        """Every rival at its best, then the best of them all if they are several."""
        rivals = []
        for name, labels in self.forms.items():
            times = [time for label in labels if (time := outcomes[label].seconds) is not None]
            seconds = min(times, default=None)
            rivals.append(Rival(name, seconds, "" if seconds else outcomes[labels[0]].note, self.nbytes))
        best = [rival.seconds for rival in rivals if rival.seconds is not None]
        if len(rivals) > 1 and best:
            rivals.insert(0, Rival(BEST, min(best), nbytes=self.nbytes))
        return tuple(rivals)


def decode_rivals(device: BenchmarkDevice, settings: Settings, shape: BatchShape) -> Rivals:
    """One query token per sequence; torch, and on CUDA what else is installed. None without torch."""
    rivals = Rivals(_bytes(settings, shape, 1))
    if importlib.util.find_spec("torch") is None:
        return rivals
    sets = _tensors(device, settings, shape, 1, 1 if settings.warm else device.sets(rivals.nbytes))
    for name, context in _backends(device).items():
        rivals.add(name, "", [_bound(context, _grouped, one) for one in sets])
        rivals.add(name, "folded", [_bound(context, _folded, one) for one in sets])
    if device.target.kind.name == "cuda":
        for name, (package, prepare) in LIBRARIES.items():
            if importlib.util.find_spec(package) is not None:
                rivals.add(name, "", _prepared(prepare, sets))
    return rivals


def prefill_rivals(device: BenchmarkDevice, settings: Settings, shape: BatchShape) -> Rivals:
    """As many queries as keys, causal; none without torch."""
    rivals = Rivals(_bytes(settings, shape, shape.tokens))
    if importlib.util.find_spec("torch") is None:
        return rivals
    sets = _tensors(device, settings, shape, shape.tokens, 1)
    for name, context in _backends(device).items():
        rivals.add(name, "", [_bound(context, _causal, one) for one in sets])
    return rivals


def _bytes(settings: Settings, shape: BatchShape, queries: int) -> int:
    rows = 2 * shape.tokens * settings.kv_heads + 2 * queries * settings.heads
    return shape.batch * rows * settings.head_dim * np.dtype(settings.dtype).itemsize


def _tensors(device: BenchmarkDevice, settings: Settings, shape: BatchShape, queries: int, count: int) -> list[Tensors]:
    import torch

    where = "cuda" if device.target.kind.name == "cuda" else "cpu"

    def random(heads: int, rows: int) -> Any:
        size = (shape.batch, heads, rows, settings.head_dim)
        return torch.randn(size, dtype=getattr(torch, settings.dtype), device=where)

    caches = (settings.kv_heads, shape.tokens)
    return [(random(settings.heads, queries), random(*caches), random(*caches)) for _ in range(count)]


def _backends(device: BenchmarkDevice) -> dict[str, Callable[[], Any]]:
    """Contexts in which torch's attention runs on one backend, by its name."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.target.kind.name != "cuda":
        torch.set_num_threads(tvm.runtime.num_threads())  # as many as our kernels have
        return {"torch SDPA": nullcontext}
    return {
        "cuDNN": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        "FlashAttention": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    }


def _bound(context: Callable[[], Any], attend: Attend, tensors: Tensors) -> Call:
    def call() -> Any:
        with context():
            return attend(*tensors)

    return call


def _prepared(prepare: Callable[..., Call], sets: Sequence[Tensors]) -> list[Call]:
    """Calls of a library; what it raises in preparing comes out of the calls, as what it raises in running."""
    try:
        return [prepare(*one) for one in sets]
    except Exception as error:
        reason = error

        def fail() -> None:
            raise reason

        return [fail]


def _grouped(q: Any, k: Any, v: Any) -> Any:
    """Several query heads to one of K and V, as torch spells it."""
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _folded(q: Any, k: Any, v: Any) -> Any:
    """The same with a group's heads as so many query tokens of one head, which every backend reads K and V once for."""
    from torch.nn.functional import scaled_dot_product_attention

    batch, heads, _, head_dim = q.shape
    folded = q.view(batch, k.shape[1], heads // k.shape[1], head_dim)
    return scaled_dot_product_attention(folded, k, v).view(q.shape)


def _causal(q: Any, k: Any, v: Any) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
