"""Locks end with their process, are taken by one at a time, and are not needed where there are none."""

from __future__ import annotations

import fcntl
import os
import threading
import time

import pytest

from rotquant_tvm import process_locks
from rotquant_tvm.process_locks import is_abandoned, locked_file, locked_folder, remove_abandoned_file


def silent():
    pass


def test_one_at_a_time(tmp_path):
    """Of threads too, each of which opens the file anew; it is gone afterwards."""
    inside, most, waited = [], [], []

    def work():
        with locked_file(tmp_path / "a" / ".lock", lambda: waited.append(1)):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.005)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8 and 0 < len(waited) < 8
    assert os.listdir(tmp_path / "a") == []


def test_a_file_that_was_left_behind_is_taken(tmp_path):
    (tmp_path / ".lock").touch()
    with locked_file(tmp_path / ".lock", lambda: pytest.fail("waited")):
        pass
    assert os.listdir(tmp_path) == []


def test_a_file_that_nobody_has_is_removed(tmp_path):
    path = tmp_path / ".lock"
    path.touch()
    remove_abandoned_file(path, 3600)
    assert not path.exists()
    with locked_file(path, silent):
        remove_abandoned_file(path, 0)
        assert path.exists()
    remove_abandoned_file(path, 0)  # there is none


def test_files_are_removed_while_they_are_taken(tmp_path):
    """Whoever waits for one that is removed makes another: still one at a time."""
    path, inside, most, stop = tmp_path / ".lock", [], [], threading.Event()

    def tidy():
        while not stop.is_set():
            remove_abandoned_file(path, 3600)

    def work():
        for _ in range(50):
            with locked_file(path, silent):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    tidier = threading.Thread(target=tidy)
    for thread in (tidier, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    tidier.join()
    assert most == [1] * 200


def test_a_folder_is_abandoned_when_nobody_has_it(tmp_path):
    folder = tmp_path / "work"
    with locked_folder(folder):
        assert not is_abandoned(folder, 0)
    assert is_abandoned(folder, 1000) and is_abandoned(folder, 1000)  # asking takes nothing
    with pytest.raises(FileExistsError), locked_folder(folder):
        pass


def test_a_folder_taken_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    folder, flock, removed = tmp_path / "work", fcntl.flock, []

    def late(descriptor, how):
        if not removed:
            removed.append(folder.rmdir())
        flock(descriptor, how)

    monkeypatch.setattr(process_locks.fcntl, "flock", late)
    with locked_folder(folder):
        assert folder.is_dir() and not is_abandoned(folder, 0)


@pytest.mark.parametrize("absent", ["module", "support"])
def test_without_locks_age_tells(tmp_path, monkeypatch, absent):
    if absent == "module":
        monkeypatch.setattr(process_locks, "fcntl", None)
    else:

        def refuse(*_):
            raise OSError("not supported")

        monkeypatch.setattr(process_locks.fcntl, "flock", refuse)
    with locked_folder(tmp_path / "work"), locked_file(tmp_path / ".lock", silent):
        assert not is_abandoned(tmp_path / "work", 1000)
        os.utime(tmp_path / "work", (1000, 1000))
        assert is_abandoned(tmp_path / "work", 1000)
    assert not is_abandoned(tmp_path / "nowhere", 0)


def test_a_place_that_cannot_be_written_is_not_locked(tmp_path):
    (tmp_path / "file").touch()
    with locked_file(tmp_path / "file" / ".lock", lambda: pytest.fail("waited")):
        pass


def test_without_locks_age_tells_of_files_too(tmp_path, monkeypatch):
    monkeypatch.setattr(process_locks, "fcntl", None)
    for age, seconds, left in ((60, 3600, True), (7200, 3600, False)):
        path = tmp_path / ".lock"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
        remove_abandoned_file(path, seconds)
        assert path.exists() == left
