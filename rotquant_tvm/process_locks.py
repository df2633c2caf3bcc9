"""Locks on files and folders that end with the process that holds them, however it ends.

They are the operating system's advisory locks (``flock``). Where there are none (Windows, some network file systems)
nothing is locked, and what relies on a lock does without: work may be done twice, but nothing is damaged.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def lock(descriptor: int, wait: bool) -> bool | None:
    """Lock an open file or folder; False if another process has it, None where nothing can be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still names the open file or folder: it may have been removed, or made anew by another."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


@contextmanager
def locked_file(path: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """Hold the lock of the file ``path``, which is made for it and removed afterwards.

    ``waiting`` is called once if another process has it. Where the file cannot be made or locked, nothing is held.
    """
    descriptor = _locked(path, waiting)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                path.unlink()  # whoever waits for it finds that it is gone, and makes another
            os.close(descriptor)


def _locked(path: Path, waiting: Callable[[], object]) -> int | None:
    told = False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError:
            return None
        held = False
        try:
            taken = lock(descriptor, wait=False)
            if taken is False:
                if not told:
                    waiting()
                told, taken = True, lock(descriptor, wait=True)
            held = bool(taken) and is_at(descriptor, path)
            if taken is None:
                return None
        finally:
            if not held:
                os.close(descriptor)
        if held:
            return descriptor


def remove_abandoned_file(path: Path, seconds: float) -> None:
    """Remove the file of a lock that no process holds; where nothing can be locked, one of so many ``seconds``.

    It is removed while this process holds it, so that whoever waits for it finds it gone and makes another.
    """
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            taken = lock(descriptor, wait=False)
            if is_at(descriptor, path) if taken else taken is None and _is_older(path, seconds):
                path.unlink()
        finally:
            os.close(descriptor)


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Make the folder ``path`` and hold its lock, where it can be locked; raises OSError if it cannot be made."""
    descriptor = _made(path)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _made(path: Path) -> int | None:
    while True:
        path.mkdir()
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # taken for a dead process's before it was locked
            continue
        except OSError:  # Windows opens no folders
            return None
        if lock(descriptor, wait=True) is None or is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def is_abandoned(folder: Path, seconds: float) -> bool:
    """Whether no process holds the folder's lock any more.

    Where nothing can be locked: whether the folder has not changed for so many ``seconds``.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return _is_older(folder, seconds)
    try:
        taken = lock(descriptor, wait=False)
    finally:
        os.close(descriptor)
    return _is_older(folder, seconds) if taken is None else taken


def _is_older(folder: Path, seconds: float) -> bool:
    try:
        return folder.lstat().st_mtime < time.time() - seconds
    except OSError:
        return False
