"""KV formats: rotations, codebooks, gains, packing; the NumPy reference."""

from .codebook import CODEBOOK_BITS, HEAD_DIMS, Codebook
from .codec import Codec, EncodedKV, sanitize
from .gains import GAIN_RULES, HALF_MAX, IP_FLOOR
from .kv_format import LINEAR_BLOCK, KVFormat, known_formats, parse_pair
from .packing import (
    TOKENS,
    VERSION,
    Section,
    TileLayout,
    code_pieces,
    gain_positions,
    pack_codes,
    unpack_codes,
)
from .rotation import BlockLayer, Rotation, RotationFamily, block_reads, rotation_families, rotation_structure

__all__ = [
    "CODEBOOK_BITS",
    "GAIN_RULES",
    "HALF_MAX",
    "HEAD_DIMS",
    "IP_FLOOR",
    "LINEAR_BLOCK",
    "TOKENS",
    "VERSION",
    "BlockLayer",
    "Codebook",
    "Codec",
    "EncodedKV",
    "KVFormat",
    "Rotation",
    "RotationFamily",
    "Section",
    "TileLayout",
    "block_reads",
    "code_pieces",
    "gain_positions",
    "known_formats",
    "pack_codes",
    "parse_pair",
    "rotation_families",
    "rotation_structure",
    "sanitize",
    "unpack_codes",
]
