"""Rotations, codebooks and the tile's layout as data: all that it takes to decode a packed cache without this package.

``codecs.safetensors`` holds the arrays; the manifest's entry "codecs" says which of them each layer uses, and has a
SHA-256 of each. ``docs/artifact.md`` says how to decode with them. The library has its own copies compiled in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from rotquant_tvm.errors import ArtifactError
from rotquant_tvm.runtime.cache_info import entry

CODECS_FILE = "codecs.safetensors"


@dataclass(frozen=True)
class CodecData:
    """The arrays by name, and per layer of the cache which of them it uses (plain data)."""

    arrays: Mapping[str, np.ndarray]
    layers: tuple[Mapping[str, Any], ...]

    def write(self, path: Path) -> None:
        """Write the arrays as a safetensors file."""
        safetensors.numpy.save_file(
            {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}, path, {"format": "np"}
        )

    def document(self) -> dict[str, Any]:
        """What the manifest says of them."""
        return {
            "file": CODECS_FILE,
            "arrays": {
                name: {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": array_digest(array)}
                for name, array in self.arrays.items()
            },
            "layers": [dict(layer) for layer in self.layers],
        }


def read_codecs(path: Path, document: Mapping[str, Any], where: str) -> CodecData:
    """Read the arrays that the manifest's ``document`` lists, and compare each with what it says.

    Raises ArtifactError naming the array that is missing or different.
    """
    listed = entry(document, "arrays", Mapping, where)
    layers = entry(document, "layers", list, where)
    arrays = {}
    try:
        with safe_open(path, framework="np") as stored:
            present = set(stored.keys())
            for name, record in listed.items():
                if name not in present:
                    raise ArtifactError(f"{path}: lacks the array {name}; compile the model again")
                arrays[name] = stored.get_tensor(name)
                found = array_digest(arrays[name])
                if not isinstance(record, Mapping) or found != record.get("sha256"):
                    expected = record.get("sha256") if isinstance(record, Mapping) else record
                    raise ArtifactError(
                        f"{path}: the array {name} has SHA-256 {found} and the manifest says {expected}; "
                        "copy the artifact again or compile the model again"
                    )
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); compile the model again") from error
    return CodecData(arrays, tuple(layers))


def array_digest(array: np.ndarray) -> str:
    """SHA-256 (hex) of an array's bytes, row by row and little endian."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(little.tobytes()).hexdigest()
