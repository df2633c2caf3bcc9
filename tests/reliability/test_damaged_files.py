"""Damaged files of every kind: named and refused, and in the compile cache made again."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from rotquant_tvm import compile_cache
from rotquant_tvm.compile_cache import CompileCache
from rotquant_tvm.errors import ArtifactError
from rotquant_tvm.runtime import load_library, read_artifact, write_artifact

from ..sampling import sampled
from .processes import forked, status_of
from .small_files import INFO, artifact, save, saved_version

FILES = ("model.so", "weights.safetensors", "tokenizer.json", "manifest.json")


def truncate(path: Path, where: float) -> None:
    os.truncate(path, int(path.stat().st_size * where))


def flip(path: Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1 << int(where * 1000) % 8
    path.write_bytes(content)


def empty(path: Path, _where: float) -> None:
    path.write_bytes(b"")


def directory(path: Path, _where: float) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path, _where: float) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def other(path: Path, _where: float) -> None:
    path.write_bytes(bytes(range(256)) * 40)


DAMAGES = (truncate, flip, empty, directory, dangling, other)


def write(path: Path) -> Path:
    weights = {"weight_0000": np.arange(5000, dtype=np.float32)}
    write_artifact(path, b"library" * 500, weights, kv_cache_info=INFO, target="llvm", tokenizer_json='{"a": 1}')
    return path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", sampled(FILES, ["model.so", "manifest.json"]))
def test_an_artifact_with_a_damaged_file_is_refused_by_name(tmp_path, name, damage):
    path = write(tmp_path / "model.rq")
    damage(path / name, 0.4)
    for attempt in (read_artifact, load_library):
        with pytest.raises(ArtifactError, match=name) as error:
            attempt(path)
        assert "\n" not in str(error.value) and error.value.exit_status == 4


@pytest.mark.full
def test_artifacts_with_any_bit_flipped_or_any_end_cut_off(tmp_path):
    path, places = write(tmp_path / "model.rq"), random.Random(0)
    for _ in range(600):
        shutil.copytree(path, tmp_path / "damaged")
        name = places.choice(FILES)
        places.choice((truncate, flip))(tmp_path / "damaged" / name, places.random())
        with pytest.raises(ArtifactError):
            read_artifact(tmp_path / "damaged")
        shutil.rmtree(tmp_path / "damaged")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", sampled(["model.so", "weights.safetensors", "manifest.json"], ["weights.safetensors"]))
def test_a_damaged_entry_of_the_compile_cache_is_made_again(tmp_path, name, damage, monkeypatch):
    monkeypatch.setattr(compile_cache, "_environment", lambda: [])
    cache = CompileCache(tmp_path)
    path = cache.entry(("a",), lambda: lambda path: artifact(path, 1)).path
    damage(path / name, 0.4)
    with pytest.warns(UserWarning, match="damaged and is made again"):
        again = cache.entry(("a",), lambda: lambda path: artifact(path, 2))
    assert again.path == path and not again.found
    assert read_artifact(path).manifest.report["version"] == 2 and os.listdir(tmp_path) == [path.name]
    assert cache.entry(("a",), lambda: pytest.fail("compiled again")).found


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_session_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "prefix.kv"
    save(path, 4096)
    damage(path, 0.4)
    with pytest.raises(ArtifactError, match=r"prefix\.kv") as error:
        saved_version(path)
    assert "\n" not in str(error.value) and error.value.exit_status == 4


@pytest.mark.full
def test_sessions_with_any_bit_flipped_or_any_end_cut_off(tmp_path):
    save(tmp_path / "prefix.kv", 300)
    content, places = (tmp_path / "prefix.kv").read_bytes(), random.Random(0)
    for _ in range(1500):
        (tmp_path / "damaged.kv").write_bytes(content)
        places.choice((truncate, flip))(tmp_path / "damaged.kv", places.random())
        with pytest.raises(ArtifactError):
            saved_version(tmp_path / "damaged.kv")


@pytest.fixture
def open_folder():
    """A folder that other users can enter, which those of pytest are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(folder)


def without_privileges(check) -> None:
    """Run ``check`` as a user whom permissions concern."""

    def run():
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        check()

    assert status_of(forked(run)) == 0


@pytest.mark.parametrize("name", ["model.so", "manifest.json", "."])
def test_an_artifact_that_may_not_be_read(open_folder, name):
    path = write(open_folder / "model.rq")
    (path / name).chmod(0)

    def check():
        with pytest.raises(ArtifactError, match=name if name != "." else r"model\.rq"):
            read_artifact(path)

    without_privileges(check)


def test_a_session_that_may_not_be_read(open_folder):
    path = open_folder / "prefix.kv"
    save(path, 40)
    path.chmod(0)

    def check():
        with pytest.raises(ArtifactError, match=r"prefix\.kv"):
            saved_version(path)

    without_privileges(check)
