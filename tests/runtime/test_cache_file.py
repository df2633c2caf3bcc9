"""Saved caches: what comes back, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from rotquant_tvm.errors import ArtifactError, DeviceError, KVCacheFull, UsageError
from rotquant_tvm.runtime import cache_file, load_library

ROWS = [list(range(3, 73)), [9, 8, 7], []]


@pytest.fixture
def saved(library, tmp_path):
    """A session of three sequences, and the file it was saved to."""
    session = library.session(batch=3, capacity=100)
    session.prefill(ROWS)
    session.save(tmp_path / "prefix.kv")
    return session, tmp_path / "prefix.kv"


def rewrite(path, metadata=None, **arrays):
    """Write the file again with other metadata or arrays, checksums made to match the arrays."""
    with safe_open(path, framework="np") as stored:
        content = {name: stored.get_tensor(name) for name in stored.keys()} | arrays
        old = stored.metadata()
    checksums = {"checksums": json.dumps({name: cache_file._checksum(array) for name, array in content.items()})}
    safetensors.numpy.save_file(content, path, old | checksums | (metadata or {}))


@pytest.mark.parametrize("capacity", [None, 70, 71, 120])
def test_a_restored_session_goes_on_like_the_saved_one(library, fake_model, saved, capacity):
    session, path = saved
    restored = library.restore(path, capacity=capacity)
    assert restored.lengths.tolist() == [70, 3, 0] and restored.cache.device_lengths().tolist() == [70, 3, 0]
    assert restored.capacity == (128 if capacity is None else capacity)
    if capacity == 70:
        with pytest.raises(KVCacheFull):
            restored.decode([5, 5, 5])
        return
    logits = restored.decode([5, 5, 5])
    for row, found in zip(ROWS, logits, strict=True):
        np.testing.assert_array_equal(found, fake_model.reference_logits([*row, 5]))
    assert session.lengths.tolist() == [70, 3, 0]  # the saved one is as it was


def test_a_file_holds_the_tiles_in_use_alone(library, saved):
    session, path = saved
    with safe_open(path, framework="np") as stored:
        assert stored.get_tensor("layer_0000").shape[2] == 3  # 70 tokens
    session.crop(40)
    session.save(path)  # replaces the older file
    with safe_open(path, framework="np") as stored:
        assert stored.get_tensor("layer_0000").shape[2] == 2
    assert library.restore(path).lengths.tolist() == [40, 3, 0]


def test_an_empty_session_can_be_saved(library, fake_model, tmp_path):
    library.session(batch=2).save(tmp_path / "empty.kv")
    restored = library.restore(tmp_path / "empty.kv")
    assert restored.lengths.tolist() == [0, 0]
    np.testing.assert_array_equal(restored.decode([4, 4])[1], fake_model.reference_logits([4]))


def test_the_same_artifact_loaded_again_takes_it(write, saved, tmp_path):
    _, path = saved
    assert load_library(write(tmp_path / "again.rq")).restore(path).lengths.tolist() == [70, 3, 0]


def test_a_library_with_other_weights_does_not(write, fake_model, saved, tmp_path):
    weights = {name: array.copy() for name, array in fake_model.weights().items()}
    weights["weight_0000"][5, 7] += 1
    other = load_library(write(tmp_path / "other.rq", weights=weights))
    with pytest.raises(ArtifactError, match="other weights"):
        other.restore(saved[1])


def test_too_small_a_capacity_is_refused(library, saved):
    with pytest.raises(UsageError, match="holds 70 tokens; the capacity is 69, use 70 or more"):
        library.restore(saved[1], capacity=69)


@pytest.mark.parametrize("where", ["_array", "_checksums"])
def test_a_host_without_room_is_named(library, saved, monkeypatch, where):
    """While a layer is read, or the file opened; afterwards it works."""

    def full(*_):
        raise MemoryError("Unable to allocate 7.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(cache_file, where, full)
        with pytest.raises(DeviceError, match=r"no room in the host's memory to restore .*prefix.kv .*7.00 GiB"):
            library.restore(saved[1])
    assert library.restore(saved[1]).lengths.tolist() == [70, 3, 0]


def test_a_changed_byte_is_noticed(library, saved):
    path = saved[1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="SHA-256"):
        library.restore(path)


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_truncated_files_are_refused(library, saved, size):
    path = saved[1]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtifactError, match="cannot be read"):
        library.restore(path)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"format": "something"}, "not a saved KV cache"),
        ({"version": "2"}, "version is '2'"),
        ({"library": "0" * 64}, "other weights"),
        ({"checksums": "{}"}, "list of checksums"),
        ({"checksums": "["}, "list of checksums"),
    ],
)
def test_foreign_metadata_are_refused(library, saved, metadata, said):
    rewrite(saved[1], metadata)
    with pytest.raises(ArtifactError, match=said):
        library.restore(saved[1])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"counts": np.array([[70, -3, 0]], np.int32)}, "counts"),
        ({"counts": np.array([70, 3, 0], np.int32)}, "counts"),
        ({"counts": np.zeros((2, 3), np.int32)}, "arrays are not those"),
        ({"layer_0000": np.zeros((3, 1, 3, 1), np.float64)}, "does not fit"),
        ({"layer_0000": np.zeros((3, 99, 3, 1), np.uint32)}, "does not fit"),
        ({"layer_9999": np.zeros(1, np.uint32)}, "arrays are not those"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(library, saved, arrays, said):
    rewrite(saved[1], **arrays)
    with pytest.raises(ArtifactError, match=said):
        library.restore(saved[1])


def test_a_place_that_cannot_be_written_is_a_usage_error(library, tmp_path):
    with pytest.raises(UsageError, match="cannot write"):
        library.session().save(tmp_path / "nowhere" / "prefix.kv")
    assert list(tmp_path.iterdir()) == []
