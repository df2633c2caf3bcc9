"""Folders to write in: moved whole, removed when they are nobody's, and errors that say how much space is needed."""

from __future__ import annotations

import errno
import os

import pytest

from rotquant_tvm import staging
from rotquant_tvm.errors import UsageError
from rotquant_tvm.staging import move_into_place, remove_abandoned, staging_folder, write_error


def test_only_what_writers_of_the_name_left_is_removed(tmp_path):
    final = tmp_path / "a+b.rq"
    left = tmp_path / ".a+b.rq.0123abcd.partial"
    kept = [".aab.rq.0123abcd.partial", ".a+b.rq.0123abcd.mine", ".a+b.rq.012.partial", "a+b.rq.0123abcd.partial"]
    for name in (left.name, *kept):
        (tmp_path / name).mkdir()
    (left / "half").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".a+b.rq.01234567.partial").symlink_to(tmp_path / "elsewhere")
    with staging_folder(final) as first, staging_folder(final) as second:  # two writers at once
        assert first.is_dir() and second.is_dir() and first != second and not left.exists()
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "elsewhere", ".a+b.rq.01234567.partial"])
    remove_abandoned(tmp_path / "nowhere", "x")


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("before", [None, "empty", "old"])
def test_a_folder_takes_its_place(tmp_path, monkeypatch, exchange, before):
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    final = tmp_path / "deep" / "model.rq"
    if before:
        final.mkdir(parents=True)
    if before == "old":
        (final / "old").write_text("old")
    with staging_folder(final) as folder:
        (folder / "new").write_text("new")
        move_into_place(folder, final)
    assert os.listdir(final.parent) == ["model.rq"] and os.listdir(final) == ["new"]


def test_the_final_name_is_never_without_a_folder(tmp_path, monkeypatch):
    """As long as the system can swap two names."""
    final, folder = tmp_path / "model.rq", tmp_path / "new"
    for each in (final, folder):
        each.mkdir()
        (each / each.name).touch()
    if not staging._exchange(folder, final):
        pytest.skip("this file system cannot swap names")
    assert os.listdir(final) == ["new"] and os.listdir(folder) == ["model.rq"]
    monkeypatch.setattr(staging.Path, "rename", lambda *_: pytest.fail("renamed"))
    move_into_place(folder, final)
    assert os.listdir(final) == ["model.rq"]


def test_parents_that_nothing_came_of_are_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), staging_folder(tmp_path / "a" / "b" / "c"):
        _ = 1 / 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("Error while serializing\nI/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_says_how_much_is_needed(tmp_path, error):
    said = write_error(tmp_path / "no" / "model.rq", error, 12_345_678)
    assert isinstance(said, UsageError) and "\n" not in str(said)
    why = "Disk quota exceeded" if getattr(error, "errno", 0) == errno.EDQUOT else "No space left on device"
    assert f"model.rq: {why} (at least 12,345,678 bytes are needed and " in str(said)
    assert str(said).endswith(" are free); free some space or choose another output")


def test_other_errors_say_nothing_of_space(tmp_path):
    error = OSError(errno.EROFS, os.strerror(errno.EROFS))
    expected = f"cannot write {tmp_path / 'a'}: Read-only file system; choose another output"
    assert str(write_error(tmp_path / "a", error, 5)) == expected
