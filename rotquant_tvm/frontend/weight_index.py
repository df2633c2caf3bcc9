"""The index of a model directory with weights in several files, checked before transformers opens what it names."""

from __future__ import annotations

import json
from pathlib import Path, PurePath

from rotquant_tvm.errors import ModelError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Where transformers looks, in this order; each may have an index of files in its place."""


def check_weight_index(folder: Path) -> None:
    """Refuse an index in the place of weights that names anything but files of the folder.

    Others may be devices, which never end, or somebody else's. Files behind links count as the folder's. Raises
    ModelError, also for an index that cannot be read.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return
        if (folder / f"{name}.index.json").is_file():
            return _check(folder, folder / f"{name}.index.json")


def _check(folder: Path, file: Path) -> None:
    try:
        named = list(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is no index of weights: {str(error)[:200]}") from error
    texts = {name for name in named if isinstance(name, str)}
    outside = sorted(name for name in texts if not _inside(folder, name))
    if outside or not all(isinstance(name, str) for name in named):
        other = repr(outside[0][:80]) if outside else "something else than names"
        raise ModelError(f"{file} names {other}, which is no file in this folder")


def _inside(folder: Path, name: str) -> bool:
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name and (folder / path).is_file()
