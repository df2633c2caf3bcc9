"""KV formats: rotations, codebooks, gains, packing; the NumPy reference."""

from .codebook import CODEBOOK_BITS, HEAD_DIMS, Codebook
from .codec import Codec, EncodedKV, sanitize
from .gains import GAIN_RULES, HALF_MAX, IP_FLOOR
from .key_layout import KeyLayout
from .kv_format import KVFormat, known_formats, parse_pair, preset_of
from .linear import LINEAR_BLOCK, LINEAR_LIMIT, NIBBLE_ZERO
from .packing import (
    TOKENS,
    VERSION,
    TileLayout,
    code_pieces,
    gain_positions,
    pack_codes,
    unpack_codes,
)
from .rotation import BlockLayer, Rotation, RotationFamily, block_reads, rotation_families, rotation_structure
from .sections import Section
from .sketch import SignCodebook, draw_sketch
from .split_codebook import SplitCodebook
from .trellis import Trellis

__all__ = [
    "CODEBOOK_BITS",
    "GAIN_RULES",
    "HALF_MAX",
    "HEAD_DIMS",
    "IP_FLOOR",
    "LINEAR_BLOCK",
    "LINEAR_LIMIT",
    "NIBBLE_ZERO",
    "TOKENS",
    "VERSION",
    "BlockLayer",
    "Codebook",
    "Codec",
    "EncodedKV",
    "KVFormat",
    "KeyLayout",
    "Rotation",
    "RotationFamily",
    "Section",
    "SignCodebook",
    "SplitCodebook",
    "TileLayout",
    "Trellis",
    "block_reads",
    "code_pieces",
    "draw_sketch",
    "gain_positions",
    "known_formats",
    "pack_codes",
    "parse_pair",
    "preset_of",
    "rotation_families",
    "rotation_structure",
    "sanitize",
    "unpack_codes",
]
