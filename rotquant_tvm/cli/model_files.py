"""Quick checks of a model's files, before torch is loaded to read them."""

from __future__ import annotations

from pathlib import Path

from rotquant_tvm.errors import ModelError, UsageError

FORMATS = ("hf", "gguf")


def check_model(text: str, model_format: str | None) -> Path:
    """Return the path of a model if it looks like one.

    ``model_format``: what it must be, or None for whatever it is. Raises UsageError for an empty name,
    ModelError if there is nothing, something else, or a GGUF file that is damaged or cut short.
    """
    if not text:
        raise UsageError("the model's name is empty; give a model directory or a .gguf file")
    path = Path(text)
    if not path.exists():
        raise ModelError(f"{path} does not exist; give a model directory or a .gguf file")
    found = "hf" if path.is_dir() else "gguf" if path.suffix.lower() == ".gguf" else None
    if found is None:
        raise ModelError(f"{path} is not a model; give a directory with config.json or a .gguf file")
    if found == "hf" and not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; give a directory that holds a transformers model")
    if model_format not in (None, found):
        raise ModelError(f"{path} is not of the format '{model_format}' but '{found}'; drop --model-format")
    if found == "gguf":
        _check_gguf(path)
    return path


def _check_gguf(path: Path) -> None:
    try:
        from rotquant_tvm.frontend.gguf_file import read_summary
    except ImportError:  # the importer says which package is missing
        return
    read_summary(path)
