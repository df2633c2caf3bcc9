"""Quick checks of a model's files, before torch is loaded to read them."""

from __future__ import annotations

from pathlib import Path

from rotquant_tvm.errors import ModelError, UsageError
from rotquant_tvm.frontend.pt2_file import check_pt2
from rotquant_tvm.frontend.source_format import EXPECTED, FORMATS, source_format

__all__ = ["FORMATS", "check_model"]


def check_model(text: str, model_format: str | None) -> Path:
    """Return the path of a model if it looks like one.

    ``model_format``: what it must be, or None for whatever it is. Raises UsageError for an empty name,
    ModelError if there is nothing, something else, or a file that is damaged or cut short.
    """
    if not text:
        raise UsageError(f"the model's name is empty; give {EXPECTED}")
    path = Path(text)
    found = source_format(path)
    if found == "hf" and not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; give a directory that holds a transformers model")
    if model_format not in (None, found):
        raise ModelError(f"{path} is not of the format '{model_format}' but '{found}'; drop --model-format")
    if found == "gguf":
        _check_gguf(path)
    if found == "onnx":
        _check_onnx(path)
    if found == "pt2":
        check_pt2(path)
    return path


def _check_gguf(path: Path) -> None:
    try:
        from rotquant_tvm.frontend.gguf_file import read_summary
    except ImportError:  # the importer says which package is missing
        return
    read_summary(path)


def _check_onnx(path: Path) -> None:
    try:
        from rotquant_tvm.frontend.onnx_import.model_file import read_file
    except ImportError:  # the importer says which package is missing
        return
    read_file(path)
