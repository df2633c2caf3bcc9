"""Equal weights of several artifacts become one file; nothing else changes."""

from __future__ import annotations

import os

import numpy as np
import pytest

from rotquant_tvm.runtime import read_artifact, write_artifact
from rotquant_tvm.runtime.cache_info import INFO_VERSION, LAYOUT_VERSION
from rotquant_tvm.shared_weights import share_weights

LAYER = {"kv_heads": 1, "head_dim": 32, "k": "f16", "v": "f16", "tile_bytes": 4096}
INFO = {"version": INFO_VERSION, "layout_version": LAYOUT_VERSION, "layers": [LAYER], "vocab_size": 8}
INFO |= {"max_position": 64, "dtype": "float32", "weights": ["weight_0000"]}


@pytest.fixture
def artifact(tmp_path):
    """Write an artifact whose weights are all ``value``."""

    def write(name, value):
        weights = {"weight_0000": np.full(300, value, np.float32)}
        return write_artifact(tmp_path / name, name.encode(), weights, kv_cache_info=INFO, target="llvm").path

    return write


def _weights(path):
    return path / "weights.safetensors"


def test_equal_weights_become_one_file(artifact):
    first, other, second = artifact("first", 1), artifact("other", 2), artifact("second", 1)
    assert share_weights(second, [other, second, first])
    assert _weights(second).samefile(_weights(first)) and not _weights(second).samefile(_weights(other))
    assert sorted(file.name for file in second.iterdir()) == sorted(file.name for file in first.iterdir())
    read_artifact(second)
    assert share_weights(second, [first])  # once more changes nothing
    for file in first.iterdir():
        file.unlink()
    read_artifact(second)


def test_different_damaged_and_foreign_entries_are_left_alone(artifact, tmp_path):
    mine, other, damaged = artifact("mine", 1), artifact("other", 2), artifact("damaged", 1)
    content = bytearray(_weights(damaged).read_bytes())
    content[-1] ^= 1
    _weights(damaged).write_bytes(content)
    (tmp_path / "file").write_text("x")
    assert not share_weights(mine, [other, damaged, tmp_path / "file", tmp_path / "missing"])
    read_artifact(mine)


def test_a_file_system_without_links_is_no_error(artifact, monkeypatch):
    first, second = artifact("first", 1), artifact("second", 1)

    def refuse(*_):
        raise OSError("links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    assert not share_weights(second, [first])
    read_artifact(second)
    assert not list(second.glob(".*"))
