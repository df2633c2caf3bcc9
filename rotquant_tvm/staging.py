"""Writing beside the final place: what is written appears under its final name whole or not at all.

A writer works in a folder of its own, ``.NAME.RANDOM.partial``, whose lock it holds. What a killed one left is removed
by the next writer of the same name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .durable import make_folder, sync_contents, sync_name
from .errors import UsageError
from .process_locks import is_abandoned, locked_folder

ABANDONED_SECONDS = 24 * 3600
"""After so long an unchanged folder counts as left behind, where locks cannot tell."""
_TOKEN = r"\.[a-z0-9_]{8}\.partial"
_HERE, _RENAME_EXCHANGE = -100, 2  # Linux: relative to the current folder; swap
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = tuple(map(os.strerror, _FULL))


@contextmanager
def staging_folder(final: Path) -> Iterator[Path]:
    """Yield a new folder beside ``final`` to write in; it is removed with all that is in it then.

    Missing parents of ``final`` are made, and removed again if nothing came of them. Raises OSError.
    """
    missing = [folder for folder in final.parents if not folder.exists()]
    folder = final.parent / f".{final.name}.{secrets.token_hex(4)}.partial"
    try:
        make_folder(final.parent)
        remove_abandoned(final.parent, re.escape(final.name))
        with locked_folder(folder):
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        with suppress(OSError):
            for parent in missing:  # the innermost first, up to one that holds something
                parent.rmdir()


def remove_abandoned(parent: Path, name: str) -> None:
    """Remove what killed writers left in ``parent`` of outputs whose names match the pattern ``name``."""
    unfinished = re.compile(rf"\.{name}{_TOKEN}")
    with suppress(OSError):
        for entry in list(parent.iterdir()):
            if unfinished.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
                if is_abandoned(entry, ABANDONED_SECONDS):
                    shutil.rmtree(entry, ignore_errors=True)


def move_into_place(folder: Path, final: Path) -> None:
    """Give a folder its final name; a folder that has it already ends up under the old name of the new one.

    The two change places in one step where the system can do that (Linux), so that the name is never without a folder.
    Elsewhere the old one is renamed first, to ``.NAME.RANDOM.replaced``. What is in the folder is on the disk before.
    Raises OSError; then ``final`` is as before.
    """
    sync_contents(folder)
    retired = folder.with_suffix(".replaced")
    if not final.is_dir():
        folder.rename(final)
    elif not _exchange(folder, final):
        final.rename(retired)
        try:
            folder.rename(final)
        except OSError:
            retired.rename(final)
            raise
    sync_name(final)
    shutil.rmtree(retired, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders' names; False where that cannot be done."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # no such function; TypeError: no such library (Windows)
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def write_error(final: Path, error: Exception, needed: int, remedy: str = "choose another output") -> UsageError:
    """The UsageError for an output of at least ``needed`` bytes that cannot be written.

    Where the disk is full it says how much is needed and how much there is.
    """
    why = getattr(error, "strerror", None) or _last_line(error)
    if not is_disk_full(error):
        return UsageError(f"cannot write {final}: {why}; {remedy}")
    why = next((text for text in _FULL_TEXTS if text in str(error)), why)
    sizes = f"at least {needed:,} bytes are needed"
    with suppress(OSError):
        sizes += f" and {shutil.disk_usage(_existing(final)).free:,} are free"
    return UsageError(f"cannot write {final}: {why} ({sizes}); free some space or {remedy}")


def is_disk_full(error: Exception) -> bool:
    """Whether an error, of the system or of a library or program that only tells it in words, says so."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(text in str(error) for text in _FULL_TEXTS)


def _existing(path: Path) -> Path:
    return next(folder for folder in path.parents if folder.exists())


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
