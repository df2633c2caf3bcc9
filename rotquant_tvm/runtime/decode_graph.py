"""Decode as a CUDA graph: the launches of one step over one cache, recorded once and replayed for every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import tvm
from tvm.runtime import Tensor

from rotquant_tvm.runtime.cache_arrays import CacheArrays
from rotquant_tvm.runtime.cuda_graph import CUDAGraph

if TYPE_CHECKING:
    from rotquant_tvm.runtime.library import CompiledLibrary


class DecodeGraph:
    """``decode`` over ``cache``, whose arrays stay where they are; the lengths are read anew at every step.

    A step must have run before. Every tensor that a kernel takes while the step is recorded is kept: no other call
    gets its memory. Raises DeviceError if the step cannot be recorded.
    """

    def __init__(self, library: CompiledLibrary, cache: CacheArrays) -> None:
        self.cache = cache
        self._inputs = (*cache.tensors, *library.weights)
        self._machine = library.virtual_machine()
        self._machine.set_instrument(_keeper({}))
        self.ids = tvm.runtime.tensor(np.zeros((cache.batch, 1), np.int32), library.device)
        self._graph = CUDAGraph(library.device, self._launch)

    def _launch(self) -> None:
        self.logits = self._machine["decode"](self.ids, *self._inputs)

    def replay(self) -> None:
        """Append the tokens in ``ids``, int32 [batch, 1], and compute ``logits``, float32 [batch, vocab]."""
        self._graph.replay()

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Append ``tokens`` [batch, 1]; returns the logits after them."""
        self.ids.copyfrom(np.ascontiguousarray(tokens, dtype=np.int32))
        self.replay()
        logits: np.ndarray = self.logits.numpy()
        return logits


def _keeper(kept: dict[int, Tensor]) -> Callable[..., int]:
    """An instrument that keeps the tensors that it sees; the machine owns it, so it must not know the graph."""

    def keep(_function: object, _symbol: str, before: bool, _result: object, *arguments: object) -> int:
        if before:
            kept.update((id(argument), argument) for argument in arguments if isinstance(argument, Tensor))
        return 0

    return keep
