"""What reaches the disk when: contents before their name, the name's folder after it, in everything that is written.

A power cut is not tried; the order of the system's calls is, and what happens where one of them fails.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tvm

from rotquant_tvm import durable, staging
from rotquant_tvm.cli import files
from rotquant_tvm.durable import make_folder, replace_file, sync_contents, sync_name
from rotquant_tvm.runtime.cache_file import save_cache
from rotquant_tvm.tuning import log_store


@pytest.fixture
def events(tmp_path, monkeypatch):
    """("sync", path) and ("name", path) in the order in which the system was asked, paths as they were then."""
    found: list[tuple[str, str]] = []

    def path_of(descriptor):
        wanted = os.fstat(descriptor)
        paths = (tmp_path, *tmp_path.rglob("*"))
        return next(path for path in paths if os.path.samestat(os.stat(path), wanted))

    def noted(function, event, name_of):
        def call(*arguments):
            result = function(*arguments)
            if result is not False:  # a swap of names that could not be
                found.append((event, str(Path(name_of(*arguments)).relative_to(tmp_path))))
            return result

        return call

    monkeypatch.setattr(os, "fsync", noted(os.fsync, "sync", path_of))
    monkeypatch.setattr(os, "replace", noted(os.replace, "name", lambda _, final: final))
    monkeypatch.setattr(staging, "_exchange", noted(staging._exchange, "name", lambda _, final: final))
    monkeypatch.setattr(Path, "rename", noted(Path.rename, "name", lambda _, final: final))
    return found


def write_cache(path):
    cache = SimpleNamespace(
        layers=[tvm.runtime.tensor(np.ones((1, 2), "uint32"))], counts=lambda: [np.ones(1, "int32")]
    )
    save_cache(path, cache, cache, "identity")


WRITERS = {
    "tuning log": lambda path: log_store.write_whole(path, "text"),
    "result of a command": lambda path: files.write_whole(path, lambda file: file.write(b"text"), "--html"),
    "saved cache": write_cache,
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_is_on_the_disk_before_its_name(tmp_path, events, writer, old):
    final = tmp_path / "final"
    if old:
        final.write_text("old")
    WRITERS[writer](final)
    (first, written), *rest = events
    assert first == "sync" and written not in ("final", ".")
    assert rest == [("name", "final"), ("sync", ".")]
    assert os.listdir(tmp_path) == ["final"] and final.read_bytes() != b"old"


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("old", [False, True])
def test_a_folder_is_on_the_disk_before_its_name(tmp_path, events, monkeypatch, exchange, old):
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    final = tmp_path / "final"
    if old:
        final.mkdir()
    with staging.staging_folder(final) as folder:
        (folder / "deep").mkdir()
        for name in ("a", "deep/b"):
            (folder / name).write_text(name)
        staging.move_into_place(folder, final)
    named = events.index(("name", "final"))
    before = [Path(path) for event, path in events[:named] if event == "sync"]
    assert sorted(path.name for path in before[:-1]) == ["a", "b", "deep"] and before[-1].suffix == ".partial"
    assert [path.name for path in before if "deep" in path.parts] == ["b", "deep"]
    assert events[named + 1 :] == [("sync", ".")]
    assert os.listdir(tmp_path) == ["final"] and sorted(os.listdir(final)) == ["a", "deep"]


def test_new_folders_are_on_the_disk_from_the_outermost_on(tmp_path, events):
    for _ in range(2):
        make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir() and events == [("sync", "."), ("sync", "a"), ("sync", "a/b")]


def test_an_output_in_new_folders(tmp_path, events):
    """The names above it come first."""
    final = tmp_path / "new" / "final"
    with staging.staging_folder(final) as folder:
        staging.move_into_place(folder, final)
    assert events[0] == ("sync", ".") and events[-2:] == [("name", "new/final"), ("sync", "new")]


def refuse(monkeypatch, number, folders, by="fsync"):
    """Have the system refuse to sync, or to open, folders or files with this error."""
    real = getattr(os, by)

    def call(what, *arguments):
        if os.path.isdir(what) == folders:
            raise OSError(number, os.strerror(number))
        return real(what, *arguments)

    monkeypatch.setattr(os, by, call)


@pytest.mark.parametrize(
    ("number", "by"),
    [(errno.EINVAL, "fsync"), (errno.ENOTSUP, "fsync"), (errno.EBADF, "fsync"), (errno.EACCES, "open")],
)
def test_where_folders_cannot_be_synced_files_are(tmp_path, events, monkeypatch, number, by):
    refuse(monkeypatch, number, folders=True, by=by)
    folder, final = tmp_path / "new", tmp_path / "final"
    folder.mkdir()
    (folder / "file").write_text("x")
    sync_contents(folder)
    replace_file(folder / "file", final)
    assert events == [("sync", "new/file"), ("sync", "new/file"), ("name", "final")]
    assert final.read_text() == "x"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_file_that_does_not_reach_the_disk_takes_no_name(tmp_path, events, monkeypatch, number):
    refuse(monkeypatch, number, folders=False)
    written, final = tmp_path / "written", tmp_path / "final"
    for path in (written, final):
        path.write_text(path.name)
    with pytest.raises(OSError, match=os.strerror(number)):
        replace_file(written, final)
    with pytest.raises(OSError, match=os.strerror(number)):
        sync_contents(tmp_path)
    assert final.read_text() == "final" and not events


def test_a_failing_folder_is_told_before_the_name_is_given_and_not_after(tmp_path, events, monkeypatch):
    refuse(monkeypatch, errno.EIO, folders=True)
    (tmp_path / "written").write_text("x")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync_contents(tmp_path)
    replace_file(tmp_path / "written", tmp_path / "final")
    sync_name(tmp_path / "final")
    assert (tmp_path / "final").read_text() == "x" and events[-1] == ("name", "final")


def test_links_are_not_followed(tmp_path, events):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "dangling").symlink_to(tmp_path / "nothing")
    (folder / "up").symlink_to(tmp_path)
    sync_contents(folder)
    assert events == [("sync", "folder")]
    assert durable._NO_FOLDER_SYNC.isdisjoint({errno.ENOSPC, errno.EIO, errno.EDQUOT})
