"""Artifact folders as seen from outside: which folder is one, and where one could be written.

Needs nothing but the standard library, so that the command line can check before it loads TVM.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from rotquant_tvm.errors import UsageError

FORMAT = "rotquant-tvm-artifact"
MANIFEST_FILE = "manifest.json"


def is_artifact(folder: Path) -> bool:
    """Whether ``folder`` holds the manifest of an artifact, damaged or not."""
    try:
        return FORMAT in (folder / MANIFEST_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def check_output(path: str | os.PathLike[str]) -> None:
    """Raise UsageError if an artifact could not be written at ``path``; meant for before a long compile."""
    final = Path(path).resolve()
    try:
        if final.is_dir():
            if any(final.iterdir()) and not is_artifact(final):
                raise UsageError(f"{final} is a folder with other files; choose another output")
        elif final.exists():
            raise UsageError(f"{final} exists and is no artifact; choose another output")
        ancestor = next(folder for folder in final.parents if folder.exists())
        if not ancestor.is_dir():
            raise UsageError(f"cannot write {final}: {ancestor} is not a folder; choose another output")
        # What the permission bits say is not all: file systems may be read-only or refuse new entries.
        probe = tempfile.mkdtemp(dir=ancestor, prefix=f".{final.name}.", suffix=".partial")
        with suppress(FileNotFoundError):  # another writer may have taken it for one that was left behind
            os.rmdir(probe)
    except OSError as error:
        raise UsageError(f"cannot write {final}: {error.strerror or error}; choose another output") from error
