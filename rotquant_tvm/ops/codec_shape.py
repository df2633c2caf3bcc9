"""What the kernels on plain vectors are specialized on; every such kernel carries it as an attribute."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import tvm

from ..formats import LINEAR_BLOCK, Codec

CODEC_ATTR = "rotquant.codec"


@dataclass(frozen=True)
class CodecShape:
    """Everything of a codec but its rotation's coefficients, and the dtype of the vectors.

    ``codebook``, ``bits`` and ``gain`` are those of the ``KVFormat``; ``structure`` is that of its rotation: the
    identity's for vectors that are rotated already.
    """

    codebook: str
    bits: int
    gain: str
    structure: tuple[tuple[int, int], ...]
    head_dim: int
    dtype: str

    @property
    def code_dtype(self) -> str:
        """The dtype of codes that are not packed."""
        return "uint16" if self.bits == 16 else "uint8"

    @property
    def gain_columns(self) -> int:
        """Columns of a gain array: at least one, which formats without gains leave alone."""
        return {"block": -(-self.head_dim // LINEAR_BLOCK)}.get(self.gain, 2 if self.codebook == "sketched" else 1)

    @staticmethod
    def describe(codec: Codec, dtype: str) -> CodecShape:
        """Return the shape of a codec for vectors of ``dtype``."""
        fmt = codec.format
        return CodecShape(fmt.codebook, fmt.bits, fmt.gain, codec.rotation.structure, codec.head_dim, dtype)

    def attributes(self) -> dict[str, str]:
        """The attribute as which a kernel carries it."""
        return {CODEC_ATTR: json.dumps(asdict(self))}

    @staticmethod
    def of(func: tvm.tirx.PrimFunc) -> CodecShape | None:
        """Read the shape that a function carries, if any."""
        text = func.attrs.get(CODEC_ATTR) if func.attrs is not None else None
        if text is None:
            return None
        record = json.loads(str(text))
        return CodecShape(**{**record, "structure": tuple(tuple(layer) for layer in record["structure"])})
