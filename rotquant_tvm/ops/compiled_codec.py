"""A codec that runs as compiled kernels: what ``Codec`` computes, on NumPy, torch or TVM tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm

from ..codegen import compile_kernel
from ..errors import UsageError
from ..formats import Codec, EncodedKV, KVFormat, Rotation
from ..target import resolve_target
from .axes import Axes
from .quantize import dequantize, quantize, roundtrip
from .rotate import rotate
from .tensor_kinds import FLOATS, TensorKind, kind_of

if TYPE_CHECKING:
    from ..vector_index import SearchKernels, VectorIndex

Shape = tuple[int, ...]


class CompiledCodec:
    """The operations of ``codec`` for ``target``; ``Codec.compile`` makes it.

    Every method takes NumPy arrays, torch tensors or TVM tensors [..., head_dim] and returns the same kind,
    on the same device. float16 and float32 are read as they are, without a copy where they are contiguous;
    other numbers are converted to float32 first. Arithmetic is float32, so codes differ from NumPy's only
    where a value lies within rounding of a codebook's boundary. A kernel is compiled when it is first needed.

    Raises ``UsageError`` for a target other than llvm and cuda, and in its methods for a last axis that is
    not ``head_dim`` and for a tensor on a device that the codec was not compiled for.
    """

    def __init__(self, codec: Codec, target: str | tvm.target.Target = "llvm") -> None:
        self.codec = codec
        self.target = resolve_target(target)
        self._device = tvm.runtime.device("cuda" if self.target.kind.name == "cuda" else "cpu", 0)
        self._kernels: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._search: SearchKernels | None = None
        self._coefficients: dict[tuple[str, str], tvm.runtime.Tensor] = {}

    @property
    def format(self) -> KVFormat:
        """The KV format."""
        return self.codec.format

    @property
    def head_dim(self) -> int:
        """The head dimension d."""
        return self.codec.head_dim

    @property
    def bits_per_element(self) -> float:
        """True bits per element, gains included."""
        return self.codec.bits_per_element

    @property
    def _code_dtype(self) -> str:
        return "uint16" if self.format.bits == 16 else "uint8"

    def encode(self, x: Any) -> EncodedKV:
        """Encode x [..., d] to codes [..., d] and gain float16 [..., gains]; defined for every input."""
        kind, x, shape = self._vectors(x)
        rows, gains = math.prod(shape[:-1]), self.codec.gains_per_vector
        codes = kind.empty((rows, self.head_dim), self._code_dtype)
        gain = kind.empty((rows, max(1, gains)), "float16")
        kernel = self._kernel(quantize, self.codec, kind.dtype(x))
        if rows:
            kernel(kind.argument(x, (rows, self.head_dim)), self._data(kind, "coefficients"), codes, gain)
        if not gains:
            gain = kind.empty((rows, 0), "float16")
        return EncodedKV(kind.result(codes, shape), kind.result(gain, (*shape[:-1], gains)))

    def decode(self, encoded: EncodedKV, dtype: Any = "float32") -> Any:
        """Decode to x̂ [..., d] in ``dtype``, float32 or float16. Raises ``UsageError`` for another dtype."""
        name = np.dtype(dtype).name if isinstance(dtype, type) else str(dtype).removeprefix("torch.")
        if name not in FLOATS:
            raise UsageError(f"cannot decode to {name}; use {' or '.join(FLOATS)}")
        kind, codes = kind_of(encoded.codes, self._device)
        _, gain = kind_of(encoded.gain, self._device)
        gains, lead = self.codec.gains_per_vector, tuple(codes.shape)[:-1]
        shape, rows = (*lead, self.head_dim), math.prod(lead)
        self._check("codes", (kind.dtype(codes), tuple(codes.shape)), (self._code_dtype, shape))
        self._check("gains", (kind.dtype(gain), tuple(gain.shape)), ("float16", (*lead, gains)))
        out = kind.empty((rows, self.head_dim), name)
        kernel = self._kernel(dequantize, self.codec, name)
        if rows:
            gain = kind.argument(gain, (rows, gains)) if gains else kind.empty((rows, 1), "float16")
            kernel(kind.argument(codes, (rows, self.head_dim)), gain, self._data(kind, "inverse_coefficients"), out)
        return kind.result(out, shape)

    def rotate(self, x: Any) -> Any:
        """Return R x for x [..., d], in the dtype it is read in."""
        return self._map(x, rotate, self.codec.rotation.structure, self.head_dim, data=("rotation",))

    def unrotate(self, y: Any) -> Any:
        """Return Rᵀ y for y [..., d], in the dtype it is read in."""
        return self._map(y, rotate, self.codec.inverse_rotation.structure, self.head_dim, data=("inverse_rotation",))

    def roundtrip(self, x: Any) -> Any:
        """Encode and decode x [..., d] in one kernel; the result has the dtype it is read in."""
        return self._map(x, roundtrip, self.codec, data=("coefficients", "inverse_coefficients"))

    def index(self, vectors: Any) -> VectorIndex:
        """Encode vectors [n, d] into an index that is searched by inner product.

        Raises ``UsageError`` for another shape.
        """
        from ..vector_index import SearchKernels, VectorIndex

        if self._search is None:
            self._search = SearchKernels(self.codec, self.target)
        return VectorIndex(self._search, vectors)

    def _map(self, x: Any, operator: Callable[..., Any], *arguments: Any, data: tuple[str, ...]) -> Any:
        kind, x, shape = self._vectors(x)
        flat = (1, 1, math.prod(shape[:-1]), self.head_dim)
        out = kind.empty(flat, kind.dtype(x))
        kernel = self._kernel(operator, *arguments, kind.dtype(x))
        if flat[2]:
            kernel(kind.argument(x, flat), *(self._data(kind, name) for name in data), out)
        return kind.result(out, shape)

    def _vectors(self, x: Any) -> tuple[TensorKind, Any, Shape]:
        kind, x = kind_of(x, self._device)
        shape = tuple(int(size) for size in x.shape)
        if not shape or shape[-1] != self.head_dim:
            raise UsageError(f"x has shape {list(shape)}; its last axis must be head_dim {self.head_dim}")
        return kind, kind.floats(x), shape

    def _check(self, what: str, found: tuple[str, Shape], expected: tuple[str, Shape]) -> None:
        """Compare (dtype, shape)."""
        if found != expected:
            texts = (f"{dtype} {list(shape)}" for dtype, shape in (found, expected))
            raise UsageError("{} {} are {}; they must be {}".format(self.format.name, what, *texts))

    def _kernel(self, operator: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
        key = (operator, *arguments)
        if key not in self._kernels:
            self._kernels[key] = compile_kernel(operator(*arguments, Axes.of(self.target)), self.target)
        return self._kernels[key]

    def _data(self, kind: TensorKind, name: str) -> tvm.runtime.Tensor:
        """Coefficients on a tensor's device, by the name of the codec's property."""
        key = (str(kind.device), name)
        if key not in self._coefficients:
            value = getattr(self.codec, name)
            data = value.data if isinstance(value, Rotation) else value
            self._coefficients[key] = tvm.runtime.tensor(data if data.size else np.zeros(1, np.float32), kind.device)
        return self._coefficients[key]
