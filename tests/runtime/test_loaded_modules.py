"""Loading a library file: every load has a mapping of its own, which ends with its module."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rotquant_tvm.runtime import loaded_modules
from rotquant_tvm.runtime.loaded_modules import load_module

NAME = "mapped-once.so"


@pytest.fixture
def path(library_bytes, tmp_path) -> Path:
    """A library that nothing else has loaded."""
    file = tmp_path / NAME
    file.write_bytes(library_bytes)
    return file


def mappings() -> set[str]:
    """The files of that name that the process has mapped, by their numbers on the disk."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if NAME in line}


needs_maps = pytest.mark.skipif(sys.platform != "linux", reason="the process's mappings are read from /proc")


@needs_maps
def test_a_file_that_is_loaded_twice_is_mapped_twice(path):
    """One mapping would look up its kernels in the module that was loaded last, and after that one's end in nothing."""
    first = load_module(path)
    one = mappings()
    second = load_module(path)
    assert len(one) == 1 and len(mappings()) == 2
    del second
    assert mappings() == one
    del first
    assert not mappings()


@needs_maps
def test_a_file_that_was_replaced_is_loaded_anew(path, library_bytes):
    old = load_module(path)
    path.unlink()
    path.write_bytes(b"no library")
    with pytest.raises(Exception, match=NAME):
        load_module(path)
    path.write_bytes(library_bytes)
    one = mappings()
    new = load_module(path)
    assert len(one) == 1 and len(mappings()) == 2
    del old, new
    assert not mappings()


@needs_maps
@pytest.mark.parametrize("case", ["full", "nothing may be run there"])
def test_without_a_copy_the_file_itself_is_loaded(path, monkeypatch, case):
    def full(*_paths):
        raise OSError(28, "No space left on device")

    if case == "full":
        monkeypatch.setattr(loaded_modules.shutil, "copyfile", full)
    else:
        monkeypatch.setattr(loaded_modules.os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert not mappings()
    module = load_module(path)
    assert mappings() == {str(path.stat().st_ino)}
    del module
