"""Which files a model consists of, so that a change of any of them can be told."""

from __future__ import annotations

from pathlib import Path

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.source_format import source_format

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("generation_config.json", "config.json", "genai_config.json"),
)
"""What ``folder_tokenizer`` reads beside a model."""


def source_files(path: Path) -> list[Path]:
    """The files that an import of ``path`` reads: a directory's own, or the file with its data and tokenizer.

    The file itself is the first. Raises ModelError for a damaged .onnx file, or without the package onnx for one.
    """
    if path.is_dir():
        return sorted(entry for entry in path.iterdir() if entry.is_file())
    try:
        kind = source_format(path) if path.is_file() else ""
    except ModelError:  # no model: whoever imports it says so
        kind = ""
    beside = [path.parent / name for name in TOKENIZER_FILES] if kind in ("onnx", "pt2") else []
    if kind == "onnx":
        from rotquant_tvm.frontend.onnx_import import onnx_data_files

        beside += onnx_data_files(path)
    return [path, *(file for file in beside if file.is_file())]
