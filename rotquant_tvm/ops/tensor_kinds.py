"""The kinds of tensor that compiled kernels take and give back: NumPy, torch and TVM.

A kind hands tensors to kernels without copying where it can; kernels take any of them through DLPack.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import tvm

from ..errors import DeviceError, UsageError

FLOATS = ("float32", "float16")
"""What kernels compute from and to; other floats are converted to float32 first."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorKind(ABC):
    """One kind of tensor on one device."""

    device: tvm.runtime.Device
    name: ClassVar[str]

    def dtype(self, x: Any) -> str:
        """Return the dtype's name."""
        return str(x.dtype)

    @abstractmethod
    def floats(self, x: Any) -> Any:
        """Return ``x`` as float32 or float16."""

    @abstractmethod
    def argument(self, x: Any, shape: Shape) -> Any:
        """Return ``x`` as a kernel reads it, compact and of another shape; the same memory if it can."""

    @abstractmethod
    def empty(self, shape: Shape, dtype: str) -> Any:
        """Return an output for a kernel."""

    @abstractmethod
    def result(self, output: Any, shape: Shape) -> Any:
        """Return what ``empty`` made as the caller gets it."""


class _NumpyKind(TensorKind):
    """NumPy arrays; for a GPU they are copied there and back."""

    name = "numpy"

    def floats(self, x: Any) -> Any:
        if x.dtype.name in FLOATS:
            return x
        with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold saturates later
            return x.astype(np.float32)

    def argument(self, x: Any, shape: Shape) -> Any:
        x = np.ascontiguousarray(x).reshape(shape)
        if self.device.type != "cpu":
            return tvm.runtime.tensor(x, self.device)
        return x if x.flags.writeable else x.copy()  # DLPack has no read-only memory

    def empty(self, shape: Shape, dtype: str) -> Any:
        if self.device.type != "cpu":
            return tvm.runtime.empty(shape, dtype, self.device)
        return np.empty(shape, dtype)

    def result(self, output: Any, shape: Shape) -> Any:
        array = output if isinstance(output, np.ndarray) else output.numpy()
        return array.reshape(shape)


class _TorchKind(TensorKind):
    """torch tensors; results lie on the device of their source and carry no gradient."""

    name = "torch"

    def dtype(self, x: Any) -> str:
        return str(x.dtype).removeprefix("torch.")

    def floats(self, x: Any) -> Any:
        return x if self.dtype(x) in FLOATS else x.float()

    def argument(self, x: Any, shape: Shape) -> Any:
        return x.detach().contiguous().reshape(shape)

    def empty(self, shape: Shape, dtype: str) -> Any:
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=str(self.device))

    def result(self, output: Any, shape: Shape) -> Any:
        return output.reshape(shape)


class _TVMKind(TensorKind):
    """TVM tensors, which must be float32 or float16 already."""

    name = "tvm"

    def floats(self, x: Any) -> Any:
        if self.dtype(x) not in FLOATS:
            raise UsageError(f"a TVM tensor of {x.dtype} cannot be converted; pass float32 or float16")
        return x

    def argument(self, x: Any, shape: Shape) -> Any:
        if not x.is_contiguous():
            if self.device.type != "cpu":
                raise UsageError("a TVM tensor on a GPU must be contiguous; pass a contiguous copy")
            x = tvm.runtime.tensor(np.ascontiguousarray(np.from_dlpack(x)))
        return x._create_view(shape)

    def empty(self, shape: Shape, dtype: str) -> Any:
        return tvm.runtime.empty(shape, dtype, self.device)

    def result(self, output: Any, shape: Shape) -> Any:
        return output._create_view(shape)


def kind_of(x: Any, device: tvm.runtime.Device) -> tuple[TensorKind, Any]:
    """Return the kind of ``x``, which kernels for ``device`` can read, and ``x`` (an array-like as NumPy).

    Raises ``UsageError`` for a tensor on a device of another type, ``DeviceError`` if ``device`` is absent.
    """
    if not device.exist:
        raise DeviceError(f"{device} is absent; compile the codec for the device at hand")
    torch = sys.modules.get("torch")
    kind: type[TensorKind]
    if isinstance(x, tvm.runtime.Tensor):
        kind = _TVMKind
    elif torch is not None and isinstance(x, torch.Tensor):
        kind = _TorchKind
    else:
        return _NumpyKind(device), np.asarray(x)
    if x.device.type != device.type:
        raise UsageError(
            f"the tensor is on {x.device} and the codec was compiled for {device}; move one of them"
        )
    return kind(tvm.runtime.device(device.type, x.device.index or 0)), x
