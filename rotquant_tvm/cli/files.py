"""Result files of a command: checked before the work, and there whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from rotquant_tvm.durable import replace_file
from rotquant_tvm.errors import UsageError


def check_file(path: Path, option: str) -> None:
    """Raise UsageError, naming ``option``, if no file could be written at ``path``."""
    if path.is_dir():
        raise UsageError(f"{option}: {path} is a folder; give the name of a file")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise UsageError(f"{option}: cannot write {path}: {error.strerror or error}") from error


def check_folder(path: Path, option: str) -> None:
    """Raise UsageError, naming ``option``, if the folder ``path`` could not be made, or nothing written into it."""
    final = path.resolve()
    try:
        there = next(folder for folder in (final, *final.parents) if folder.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is no folder")
        # What the permission bits say is not all: file systems may be read-only or refuse new entries.
        os.rmdir(tempfile.mkdtemp(dir=there, prefix=".tvmc-", suffix=".partial"))
    except OSError as error:
        raise UsageError(f"{option}: cannot write into {final}: {error.strerror or error}") from error


def write_whole(path: Path, write: Callable[[BinaryIO], object], option: str) -> None:
    """Let ``write`` fill the file ``path``; if anything fails, ``path`` is as it was.

    Raises UsageError, naming ``option``, if the file cannot be written.
    """
    partial = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            partial = Path(file.name)
            write(file)  # type: ignore[arg-type]
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)  # temporary files are private, results are not
        replace_file(partial, path)
    except OSError as error:
        raise UsageError(f"{option}: cannot write {path}: {error.strerror or error}") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
