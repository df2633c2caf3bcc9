"""What kind of model a path is, told from the file's first bytes."""

from __future__ import annotations

from pathlib import Path

from rotquant_tvm.errors import ModelError

FORMATS = ("hf", "gguf", "onnx", "pt2")
EXPECTED = "a directory with config.json, a .gguf file, an .onnx file or a .pt2 file"

_SUFFIXES = {".gguf": "gguf", ".onnx": "onnx", ".pt2": "pt2"}
_MAX_IR_VERSION = 64


def source_format(path: Path) -> str:
    """One of ``FORMATS``: "hf" for a directory, else by content, and by the suffix where that tells nothing.

    Raises ModelError if there is nothing, or something else.
    """
    if path.is_dir():
        return "hf"
    if not path.exists():
        raise ModelError(f"{path} does not exist; give {EXPECTED}")
    found = _by_content(path) or _SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise ModelError(f"{path} is not a model; give {EXPECTED}")
    return found


def _by_content(path: Path) -> str | None:
    if not path.is_file():  # a pipe would wait for a writer
        return None
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if start[:4] == b"GGUF":
        return "gguf"
    # A protobuf whose first field is a small number: ONNX's version, and behind it the producer or the next fields.
    if len(start) > 2 and start[0] == 0x08 and 0 < start[1] <= _MAX_IR_VERSION and start[2] in _NEXT_FIELDS:
        return "onnx"
    return None


_NEXT_FIELDS = frozenset({0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72, 0xA2, 0xCA})
"""Tags of the other fields of ONNX's ModelProto."""
