"""The codecs of a compiled cache as arrays and plain data (``runtime.codec_file``), to decode it elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .formats import NIBBLE_ZERO, Codebook, Codec, SplitCodebook, TileLayout, Trellis, code_pieces, gain_positions
from .formats.packing import Role
from .kv_cache_config import KVCacheConfig
from .runtime.codec_file import CodecData

GAIN_POSITIONS = "positions.gains"


def codec_data(info: Mapping[str, Any], config: KVCacheConfig) -> CodecData:
    """Return the codecs of the cache that ``kv_cache_info()`` describes, compiled with ``config``."""
    layers = info["layers"]
    fitted, _ = config.fitted([layer["head_dim"] for layer in layers])
    arrays: dict[str, np.ndarray] = {GAIN_POSITIONS: gain_positions().astype(np.int32)}
    described = []
    for index, layer in enumerate(layers):
        codecs = fitted.codecs(index, len(layers), layer["head_dim"])
        if [codec.format.name for codec in codecs] != [layer["k"], layer["v"]]:
            raise RuntimeError(f"layer {index} has the formats {layer['k']}/{layer['v']}, not those of its codecs")
        described.append(_layer(index, codecs, arrays))
    return CodecData(arrays, tuple(described))


def _layer(index: int, codecs: tuple[Codec, Codec], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Describe one layer, and add its arrays; those of the same name are the same."""
    k, v = codecs
    layout = TileLayout(k.format, v.format, k.head_dim)
    return {
        "sections": {name: [section.offset, section.nbytes] for name, section in layout.sections.items()},
        "k": _role("k", index, k, arrays),
        "v": _role("v", index, v, arrays),
    }


def _role(role: Role, index: int, codec: Codec, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    fmt, dim = codec.format, codec.head_dim
    rotation = []
    for number, layer in enumerate(codec.rotation.layers):
        name = f"rotation.{index}.{role}.{number}"
        arrays[name] = layer.coefficients.astype(np.float32)
        rotation.append({"coefficients": name, "block": layer.block, "stride": layer.stride})
    plane = fmt.plane_dims(dim)
    return {
        "format": fmt.name,
        "bits": fmt.bits,
        "codebook": fmt.codebook,
        "values": _values(codec, arrays),
        "positions": _positions(role, fmt.bits, dim, arrays),
        "plane": {"dims": plane, "positions": _positions(role, 1, plane, arrays)} if plane else None,
        "gains": fmt.gains_per_vector(dim),
        "rotation": rotation,
    }


def _positions(role: Role, bits: int, dim: int, arrays: dict[str, np.ndarray]) -> str:
    """int32 [32, dim, bits]: where in its section each bit of each code is, 8·byte + bit."""
    name = f"positions.{role}.{bits}bit.d{dim}"
    arrays[name] = code_pieces(role, bits, dim)
    return name


def _values(codec: Codec, arrays: dict[str, np.ndarray]) -> list[str]:
    """float32 tables of what codes (of a trellis: states) stand for before the gain; none for 16-bit formats.

    Of two, the first is that of the dims with a further bit.
    """
    fmt, dim, book = codec.format, codec.head_dim, codec.codebook
    if isinstance(book, SplitCodebook):
        tables = {f"values.lloyd{b.bits}.d{dim}": b.centroids for b in (book.wide, book.narrow)}
    elif isinstance(book, Codebook | Trellis):
        tables = {f"values.{fmt.codebook}{fmt.bits}.d{dim}": book.centroids}
    elif fmt.codebook == "linear":
        codes = np.arange(2**fmt.bits)
        signed = codes.astype(np.uint8).view(np.int8) if fmt.bits == 8 else codes - NIBBLE_ZERO
        tables = {f"values.linear{fmt.bits}": signed.astype(np.float32)}
    else:
        tables = {}
    arrays.update(tables)
    return list(tables)
