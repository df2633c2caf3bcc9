"""The flush kernel where there is no GPU: on the simulated one, against the formats' own encoding."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.flush_cuda import flush_kernel

from rotquant_tvm import ops

from ..ops.cases import Case
from ..ops.conftest import Kernels
from ..ops.conftest import rng as _rng
from ..ops.test_flush import WITH_RECENT, check_single_tokens
from .cuda_targets import target_of
from .hand_laid_writers import site_shape
from .simulated_append import AppendGPU

rng = _rng


class SimulatedFlush(Kernels):
    """The operators for the CPU, but the flush is the kernel for GPUs."""

    def __init__(self):
        super().__init__("llvm")
        self.launches = 0

    def build(self, operator, *arguments, **options):
        """A function, or a kernel to be simulated."""
        if operator is not ops.flush:
            return super().build(operator, *arguments, **options)
        if operator not in self._compiled:
            self._compiled[operator] = flush_kernel(site_shape(operator, arguments), target_of("sm_90a"), warps=2)
        return self._compiled[operator]

    def run(self, kernel, *arrays, writes):
        """Call a function or launch the kernel."""
        if kernel is not self._compiled.get(ops.flush):
            return super().run(kernel, *arrays, writes=writes)
        self.launches += 1
        arrays = [np.ascontiguousarray(array).copy() for array in arrays]
        AppendGPU(kernel)(*arrays)
        return arrays[0] if len(writes) == 1 else [arrays[index] for index in writes]


@pytest.mark.parametrize("policy", WITH_RECENT, ids=lambda p: p.name)
def test_a_chunk_and_single_tokens(rng, policy):
    """Of the single tokens, which are not flushed themselves, the kernel is given NaN."""
    kernels = SimulatedFlush()
    check_single_tokens(kernels, rng, Case("hurwitz3", 64, 1, 1), policy, "float16")
    assert kernels.launches == 3
