"""The index of a model directory whose weights are in several files, checked before transformers opens what it names."""

from __future__ import annotations

import json
from pathlib import Path, PurePath

from rotquant_tvm.errors import ModelError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def check_weight_indexes(folder: Path) -> None:
    """Refuse an index that names anything but files of the folder: others may be devices, or somebody else's.

    Files behind links count as the folder's. Raises ModelError, also for an index that cannot be read.
    """
    for file in (folder / name for name in INDEXES):
        if not file.is_file():
            continue
        try:
            named = list(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} is no index of weights: {str(error)[:200] or 'its nesting'}") from error
        texts = {name for name in named if isinstance(name, str)}
        outside = sorted(name for name in texts if not _inside(folder, name))
        if outside or not all(isinstance(name, str) for name in named):
            other = repr(outside[0][:80]) if outside else "something else than names"
            raise ModelError(f"{file} names {other}, which is no file in this folder")


def _inside(folder: Path, name: str) -> bool:
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name and (folder / path).is_file()
