"""The NumPy reference: encode and decode vectors in a KV format (METHODS: the common pipeline).

``x [..., d] -> codes, gain -> x̂ [..., d]``. NumPy computes in float64 unless told float32, whose arithmetic
the compiled kernels share up to the order of their sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ..errors import FormatError, UsageError
from .codebook import Codebook
from .gains import GAIN_RULES, HALF_MAX, half_gain
from .kv_format import LINEAR_BLOCK, KVFormat
from .rotation import Rotation, rotation_structure

if TYPE_CHECKING:
    from ..ops.compiled_codec import CompiledCodec

LINEAR_LIMIT = 127
_FLOATS: dict[str, DTypeLike] = {"half": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True, eq=False)
class EncodedKV:
    """Encoded vectors.

    codes  uint8 [..., d] (int8 bit patterns for q8_0); uint16 [..., d] bit patterns for f16 and bf16.
    gain   float16 [..., gains_per_vector].
    """

    codes: NDArray[np.uint8] | NDArray[np.uint16]
    gain: NDArray[np.float16]


def sanitize(x: ArrayLike, dtype: DTypeLike = np.float64) -> NDArray[Any]:
    """Return x in ``dtype`` with NaN replaced by 0 and everything else, ±Inf included, clipped to ±65504.

    Raises ``UsageError`` if ``dtype`` is neither float64 nor float32.
    """
    if np.dtype(dtype) not in (np.float64, np.float32):
        raise UsageError(f"cannot compute in {np.dtype(dtype)}; use float64 or float32")
    with np.errstate(over="ignore", invalid="ignore"):  # a cast to Inf, and signalling NaNs, are defined here
        values = np.asarray(x).astype(dtype)
    clipped: NDArray[Any] = np.clip(values, -HALF_MAX, HALF_MAX)
    clipped[np.isnan(clipped)] = 0
    return clipped


@dataclass(frozen=True, eq=False)
class Codec:
    """A KV format together with the rotation that its vectors use.

    Raises ``FormatError`` if the format cannot take the rotation or its head dimension.
    """

    format: KVFormat
    rotation: Rotation

    def __post_init__(self) -> None:
        self.format.check(self.head_dim)
        structure = rotation_structure(self.format.rotation, self.head_dim)
        if self.rotation.structure != structure:
            raise FormatError(
                f"{self.format.name} has layers (block, stride) {structure}, not {self.rotation.structure}; "
                f"use Rotation.draw('{self.format.rotation}', {self.head_dim})"
            )

    @property
    def head_dim(self) -> int:
        """The head dimension d."""
        return self.rotation.head_dim

    @property
    def bits_per_element(self) -> float:
        """True bits per element, gains included."""
        return self.format.bits_per_element(self.head_dim)

    @property
    def gains_per_vector(self) -> int:
        """How many fp16 gains each vector has."""
        return self.format.gains_per_vector(self.head_dim)

    @cached_property
    def inverse_rotation(self) -> Rotation:
        """Rᵀ."""
        return self.rotation.inverse()

    @cached_property
    def codebook(self) -> Codebook | None:
        """The frozen codebook of a lloyd format, None for the others."""
        return Codebook(self.format.bits, self.head_dim) if self.format.codebook == "lloyd" else None

    def rotate(self, x: ArrayLike) -> NDArray[Any]:
        """Return R x for x [..., d] (what a query meets cached keys as)."""
        return self.rotation.apply(x)

    def unrotate(self, y: ArrayLike) -> NDArray[Any]:
        """Return Rᵀ y for y [..., d] (what the attention output needs once)."""
        return self.inverse_rotation.apply(y)

    def encode(self, x: ArrayLike, dtype: DTypeLike = np.float64) -> EncodedKV:
        """Encode vectors [..., d] of any float dtype, computing in ``dtype`` (float64 or float32).

        Defined for every input: NaN counts as 0, and ±Inf and finite values saturate at ±65504. Raises
        ``UsageError`` if the last axis is not ``head_dim``.
        """
        shape = np.shape(x)
        if not shape or shape[-1] != self.head_dim:
            raise UsageError(f"x has shape {list(shape)}; its last axis must be head_dim {self.head_dim}")
        values = sanitize(x, dtype)
        if self.codebook is not None:
            return self._encode_lloyd(values, self.codebook)
        if self.format.codebook == "linear":
            return _encode_linear(values, self.gains_per_vector)
        codes = values.astype(_FLOATS[self.format.codebook]).view(np.uint16)
        return EncodedKV(codes, np.empty((*codes.shape[:-1], 0), np.float16))

    def decode(self, encoded: EncodedKV, dtype: DTypeLike = np.float64) -> NDArray[Any]:
        """Decode to x̂ [..., d] in ``dtype`` (float64 or float32)."""
        return self.unrotate(self.decode_rotated(encoded, dtype))

    def decode_rotated(self, encoded: EncodedKV, dtype: DTypeLike = np.float64) -> NDArray[Any]:
        """Decode to R x̂ [..., d] in ``dtype``: what an attention kernel reads."""
        gain: NDArray[Any] = encoded.gain.astype(dtype)
        if self.codebook is not None:
            values: NDArray[Any] = self.codebook.centroids.astype(dtype)[encoded.codes]
        elif self.format.codebook == "linear":
            values = encoded.codes.view(np.int8).astype(dtype)
            gain = np.repeat(gain, LINEAR_BLOCK, axis=-1)[..., : self.head_dim]
        else:
            return encoded.codes.view(_FLOATS[self.format.codebook]).astype(dtype)
        values *= gain
        return values

    def compile(self, target: Any = "llvm") -> CompiledCodec:
        """Return this codec as TensorIR kernels for ``target`` (``"llvm"``, ``"cuda"`` or a TVM target).

        Raises ``UsageError`` for another target.
        """
        from ..ops.compiled_codec import CompiledCodec

        return CompiledCodec(self, target)

    def _encode_lloyd(self, x: NDArray[Any], codebook: Codebook) -> EncodedKV:
        rho = np.sqrt((x * x).sum(-1))
        y = self.rotation.apply(x)
        codes = codebook.nearest(y, rho[..., None])
        codes[rho == 0] = 2 ** (codebook.bits - 1)  # defined, though with gain 0 any code decodes to 0
        q = codebook.centroids.astype(x.dtype)[codes]
        gain = GAIN_RULES[self.format.gain](rho, y, q)
        return EncodedKV(codes, half_gain(gain)[..., None])


def _encode_linear(x: NDArray[Any], blocks: int) -> EncodedKV:
    """Encode as q8_0: per block of 32 a scale, amax/127 in fp16; codes = x/scale rounded to even, in ±127."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, blocks * LINEAR_BLOCK - x.shape[-1])]
    padded = np.pad(x, padding).reshape(*x.shape[:-1], blocks, LINEAR_BLOCK)
    gain = half_gain(np.abs(padded).max(-1) / LINEAR_LIMIT)
    scale = gain.astype(x.dtype)[..., None]
    quotient = np.divide(padded, scale, out=np.zeros_like(padded), where=scale > 0)
    codes = np.clip(np.rint(quotient), -LINEAR_LIMIT, LINEAR_LIMIT).astype(np.int8)
    flat = codes.reshape(*x.shape[:-1], blocks * LINEAR_BLOCK)[..., : x.shape[-1]]
    return EncodedKV(np.ascontiguousarray(flat).view(np.uint8), gain)
