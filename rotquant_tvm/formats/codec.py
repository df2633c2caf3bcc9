"""The NumPy reference: encode and decode vectors in a KV format.

``x [..., d] -> codes, gain -> x̂ [..., d]``. NumPy computes in float64 unless told float32, whose arithmetic
the compiled kernels share up to the order of their sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ..errors import FormatError, UsageError
from .codebook import Codebook
from .gains import GAIN_RULES, HALF_MAX, half_gain
from .kv_format import KVFormat
from .linear import NIBBLE_ZERO, encode_linear, linear_values, scale_of_elements
from .rotation import Rotation, rotation_structure
from .sketch import SignCodebook
from .split_codebook import SplitCodebook
from .trellis import Trellis

if TYPE_CHECKING:
    from ..ops.compiled_codec import CompiledCodec

RotatedCodebook = Codebook | SplitCodebook | SignCodebook | Trellis
_FLOATS: dict[str, DTypeLike] = {"half": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True, eq=False)
class EncodedKV:
    """Encoded vectors.

    codes  uint8 [..., d] (int8 bit patterns for q8_0); uint16 [..., d] bit patterns for f16 and bf16. Where a format
           has a plane of further bits, one stands above a code's others: at ``bits``.
    gain   float16 [..., gains_per_vector]; of a sketched format the code's gain and the residual's norm.
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

    ``sketch`` is that of the rotated residuals, for the formats that store one. Raises ``FormatError`` if the format
    cannot take the rotation, the sketch or their head dimension.
    """

    format: KVFormat
    rotation: Rotation
    sketch: Rotation | None = None

    def __post_init__(self) -> None:
        self.format.check(self.head_dim)
        if (self.sketch is not None) != (self.format.codebook == "sketched"):
            has = "has no" if self.format.codebook != "sketched" else "needs a"
            raise FormatError(f"{self.format.name} {has} sketch; use KVFormat.codec, which draws what a format needs")
        structure = rotation_structure(self.format.rotation, self.head_dim)
        if self.rotation.structure != structure and not self.rotation.identity:
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
    def codebook(self) -> RotatedCodebook | None:
        """The frozen codebook behind a rotation, None for the formats without."""
        kind = self.format.codebook
        if kind == "sign":
            return SignCodebook(self.head_dim)
        if kind == "split":
            return SplitCodebook(self.format.bits, self.head_dim)
        if kind == "trellis":
            return Trellis(self.format.bits, self.head_dim)
        return Codebook(self.format.bits, self.head_dim) if kind in ("lloyd", "sketched") else None

    @cached_property
    def code_values(self) -> NDArray[np.float32] | None:
        """float32 [2^bits]: what each code stands for before the gain, if one table of at most 16 says it."""
        if isinstance(self.codebook, Codebook | SignCodebook):
            return self.codebook.centroids
        if self.format.codebook == "linear" and self.format.bits == 4:
            return np.arange(16, dtype=np.float32) - np.float32(NIBBLE_ZERO)
        return None

    @property
    def coefficients(self) -> NDArray[np.float32]:
        """float32 [n]: what kernels that encode take: the rotation's data, then the sketch's; n is at least 1."""
        return _coefficients(self.rotation, self.sketch)

    @property
    def inverse_coefficients(self) -> NDArray[np.float32]:
        """float32 [n]: what kernels that decode take: the data of Rᵀ, then of Sᵀ; n is at least 1."""
        return _coefficients(self.inverse_rotation, None if self.sketch is None else self.sketch.inverse())

    def in_rotated_basis(self) -> Codec:
        """Return this codec for vectors that are rotated already."""
        return replace(self, rotation=Rotation(self.head_dim, ()))

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
            return EncodedKV(*encode_linear(values, self.format.bits))
        codes = values.astype(_FLOATS[self.format.codebook]).view(np.uint16)
        return EncodedKV(codes, np.empty((*codes.shape[:-1], 0), np.float16))

    def decode(self, encoded: EncodedKV, dtype: DTypeLike = np.float64) -> NDArray[Any]:
        """Decode to x̂ [..., d] in ``dtype`` (float64 or float32)."""
        return self.unrotate(self.decode_rotated(encoded, dtype))

    def decode_rotated(self, encoded: EncodedKV, dtype: DTypeLike = np.float64) -> NDArray[Any]:
        """Decode to R x̂ [..., d] in ``dtype``: what an attention kernel reads."""
        features = self.features(encoded, dtype)
        if self.sketch is None:
            return features
        codes, signs = np.split(features, 2, axis=-1)
        decoded: NDArray[Any] = codes + self.sketch.inverse().apply(signs)
        return decoded

    def features(self, encoded: EncodedKV, dtype: DTypeLike = np.float64) -> NDArray[Any]:
        """Return what stands for x̂ where only inner products are wanted: [..., d], or [..., 2d] with a sketch.

        ⟨q, x̂⟩ is the inner product of ``query_features(q)`` with these. They cost a lookup and a product per element;
        a sketch's share of x̂ would cost d of each.
        """
        gain: NDArray[Any] = encoded.gain.astype(dtype)
        if self.sketch is not None and isinstance(self.codebook, Codebook):
            low, bits = encoded.codes & (2**self.format.bits - 1), encoded.codes >> self.format.bits
            codes = self.codebook.decode(low, dtype) * gain[..., :1]
            return np.concatenate([codes, SignCodebook(self.head_dim).decode(bits, dtype) * gain[..., 1:]], axis=-1)
        if self.codebook is not None:
            values: NDArray[Any] = self.codebook.decode(encoded.codes, dtype)
        elif self.format.codebook == "linear":
            values = linear_values(encoded.codes, self.format.bits, dtype)
            gain = scale_of_elements(gain, self.head_dim)
        else:
            return encoded.codes.view(_FLOATS[self.format.codebook]).astype(dtype)
        values *= gain
        return values

    def query_features(self, q: ArrayLike) -> NDArray[Any]:
        """Return R q for q [..., d], with a sketch R q and S R q side by side: [..., 2d]. See ``features``."""
        rotated = self.rotation.apply(q)
        return rotated if self.sketch is None else np.concatenate([rotated, self.sketch.apply(rotated)], axis=-1)

    def score(self, q: ArrayLike, encoded: EncodedKV) -> NDArray[Any]:
        """Return the inner products [..., n] of queries [..., d] with encoded vectors [n, d]."""
        products: NDArray[Any] = self.query_features(q) @ self.features(encoded).T
        return products

    def compile(self, target: Any = "llvm") -> CompiledCodec:
        """Return this codec as TensorIR kernels for ``target`` (``"llvm"``, ``"cuda"`` or a TVM target).

        Raises ``UsageError`` for another target.
        """
        from ..ops.compiled_codec import CompiledCodec

        return CompiledCodec(self, target)

    def _encode_lloyd(self, x: NDArray[Any], codebook: RotatedCodebook) -> EncodedKV:
        rho = np.sqrt((x * x).sum(-1))
        y = self.rotation.apply(x)
        codes = codebook.nearest(y, rho[..., None])
        codes[rho == 0] = codebook.middle()  # defined, though with gain 0 any code decodes to 0
        q = codebook.decode(codes, x.dtype)
        gain = half_gain(GAIN_RULES[self.format.gain](rho, y, q))[..., None]
        if self.sketch is None:
            return EncodedKV(codes, gain)
        residual = y - gain.astype(x.dtype) * q
        signs = (self.sketch.apply(residual) > 0).astype(np.uint8)
        norm = half_gain(np.sqrt((residual * residual).sum(-1)))[..., None]
        codes = (codes | signs << self.format.bits).astype(np.uint8)
        return EncodedKV(codes, np.concatenate([gain, norm], axis=-1))


def _coefficients(rotation: Rotation, sketch: Rotation | None) -> NDArray[np.float32]:
    parts = [rotation.data] if sketch is None else [rotation.data, sketch.data]
    data = np.concatenate(parts)
    return data if data.size else np.zeros(1, np.float32)
