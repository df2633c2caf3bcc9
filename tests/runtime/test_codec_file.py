"""Rotations and codebooks beside the library: read back as written, and each damage named."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import safetensors.numpy

from rotquant_tvm.errors import ArtifactError
from rotquant_tvm.runtime import CodecData, read_artifact
from rotquant_tvm.runtime.codec_file import array_digest

DATA = CodecData(
    {
        "rotation.0.k.0": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "positions.gains": np.arange(32, dtype=np.int32),
    },
    ({"k": {"format": "iso3"}}, {"k": {"format": "f16"}}),
)


@pytest.fixture
def path(write, tmp_path):
    return write(tmp_path / "model.rq", codecs=DATA)


def test_what_is_written_is_read_back(path):
    found = read_artifact(path).codecs()
    assert found.layers == DATA.layers and list(found.arrays) == list(DATA.arrays)
    for name, array in DATA.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)
    assert os.stat(path / "codecs.safetensors").st_mode == os.stat(path / "manifest.json").st_mode


def test_the_manifest_lists_them(path):
    listed = json.loads((path / "manifest.json").read_text())["codecs"]
    assert listed["file"] == "codecs.safetensors" and len(listed["layers"]) == 2
    gains = listed["arrays"]["positions.gains"]
    assert gains == {"dtype": "int32", "shape": [32], "sha256": array_digest(np.arange(32, dtype=">i4"))}


def test_an_artifact_may_have_none(artifact):
    opened = read_artifact(artifact)
    assert opened.codecs() is None and not (artifact / "codecs.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arrays: arrays.pop("rotation.0.k.0"), r"lacks the array rotation\.0\.k\.0"),
        (lambda arrays: arrays["positions.gains"].fill(1), r"positions\.gains has SHA-256 \w{64} and the manifest"),
    ],
)
def test_arrays_that_differ_are_named(path, change, said):
    arrays = {name: array.copy() for name, array in DATA.arrays.items()}
    change(arrays)
    opened = read_artifact(path)
    safetensors.numpy.save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, path / "codecs.safetensors")
    with pytest.raises(ArtifactError, match=said):
        opened.codecs()
    with pytest.raises(ArtifactError, match=r"codecs\.safetensors"):
        read_artifact(path)


def test_a_damaged_file_is_refused_with_both_checksums(path):
    file = path / "codecs.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    expected = json.loads((path / "manifest.json").read_text())["files"]["codecs.safetensors"]["sha256"]
    with pytest.raises(ArtifactError, match=rf"SHA-256 is \w{{64}}, and the manifest says {expected}"):
        read_artifact(path)
    with pytest.raises(ArtifactError, match=r"positions\.gains"):
        read_artifact(path, verify=False).codecs()
