"""Where tuning logs lie: the user's, the packaged, and which folder is one. Needs nothing but the standard library."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from ..errors import LogError

FORMAT, VERSION = "rotquant-tvm-tuning-log", 1
MANIFEST_FILE = "manifest.json"
PENDING_FILE = ".pending.json"
"""The three files of a log that is being written; what they say counts while it is there."""
_MOST_BYTES = 64 << 20
WORKLOAD_FILE, RECORD_FILE = "database_workload.json", "database_tuning_record.json"


def user_logs() -> Path:
    """Where ``tvmc tune`` writes: ``rotquant_tvm/tuning_logs`` in $XDG_DATA_HOME, or in ~/.local/share."""
    base = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not base.is_absolute():  # the XDG specification says to ignore those
        base = Path.home() / ".local" / "share"
    return base / "rotquant_tvm" / "tuning_logs"


def packaged_logs() -> Path:
    """The logs that come with the package."""
    return Path(str(files("rotquant_tvm.tuning_logs")))


def is_log(folder: Path) -> bool:
    """Whether a folder has the manifest of a tuning log, damaged or not: artifacts have manifests too."""
    path = folder / MANIFEST_FILE
    try:
        if not path.is_file():  # a pipe would wait for a writer
            return False
        if any((folder / name).is_file() for name in (WORKLOAD_FILE, RECORD_FILE)):
            return True
        with path.open("rb") as file:
            return FORMAT.encode() in file.read(_MOST_BYTES)
    except OSError:
        return False


def log_folders(path: Path) -> list[Path]:
    """The log folders at a path: itself, or those in it."""
    if is_log(path):
        return [path]
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and is_log(entry))
    except OSError:
        return []


def log_roots(given: Path | None = None) -> list[Path]:
    """The folders that a compile looks into, in order. Raises ``LogError`` if the ``given`` one has no log."""
    if given is not None and not log_folders(given):
        raise LogError(f"{given} has no tuning log: neither {MANIFEST_FILE} nor folders with one; see tvmc logs list")
    return [*([given] if given is not None else []), user_logs(), packaged_logs()]


def user_log_files() -> list[Path]:
    """The files of the user's logs, which decide what a compile gives."""
    names = (MANIFEST_FILE, WORKLOAD_FILE, RECORD_FILE, PENDING_FILE)
    candidates = (folder / name for folder in log_folders(user_logs()) for name in names)
    return [file for file in candidates if file.is_file()]
