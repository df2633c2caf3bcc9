"""Kernels for the operator tests, compiled once per target: llvm, and CUDA where there is a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from rotquant_tvm.ops import Axes
from rotquant_tvm.target import resolve_target


class Kernels:
    """Compiles operators for one target, each once, and runs them on NumPy arrays."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.target = resolve_target(kind)
        self.device = tvm.cuda(0) if kind == "cuda" else tvm.cpu()
        self._compiled = {}

    def build(self, operator, *arguments, **options):
        """The compiled function of ``operator(*arguments, **options)``, given the axes of the target."""
        key = (operator, arguments, tuple(sorted(options.items())))
        if key not in self._compiled:
            func = operator(*arguments, axes=Axes.of(self.target), **options)
            mod = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
            self._compiled[key] = tvm.compile(mod, self.target)["kernel"]
        return self._compiled[key]

    def tensor(self, array):
        """An array on the target's device."""
        return tvm.runtime.tensor(np.ascontiguousarray(array), self.device)

    def run(self, kernel, *arrays, writes):
        """Call a kernel; return the arguments numbered ``writes``, assert that the others stay."""
        tensors = [self.tensor(array) for array in arrays]
        kernel(*tensors)
        after = [tensor.numpy() for tensor in tensors]
        indices = [index % len(arrays) for index in writes]
        for index, (old, new) in enumerate(zip(arrays, after, strict=True)):
            if index not in indices:
                np.testing.assert_array_equal(_bytes(old), _bytes(new))
        results = [after[index] for index in indices]
        return results[0] if len(results) == 1 else results


def _bytes(array):
    return np.ascontiguousarray(array).view(np.uint8)


def has_gpu() -> bool:
    """Whether there is a CUDA device that TVM can use."""
    return bool(tvm.cuda(0).exist)


@pytest.fixture(scope="session", params=["llvm", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request) -> Kernels:
    """The operators on one target."""
    if request.param == "cuda" and not has_gpu():
        pytest.skip("no CUDA device")
    return Kernels(request.param)


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers of the test's own, fresh for each parameter set."""
    return np.random.default_rng(sum(request.node.name.encode()))


@pytest.fixture(scope="session")
def poisoned():
    """An output to overwrite: NaN, or random bits where the dtype has no NaN."""

    def poison(shape, dtype):
        if np.dtype(dtype).kind == "f":
            return np.full(shape, np.nan, dtype)
        return np.random.default_rng(9).integers(0, np.iinfo(dtype).max, shape, dtype)

    return poison
