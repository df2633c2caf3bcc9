"""Saved caches and artifacts' manifests of any content: taken up, or refused in one error, the session unharmed."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest
import safetensors.numpy
import tvm
from hypothesis import strategies as st

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.errors import ArtifactError
from rotquant_tvm.runtime import TokenizerSpec
from rotquant_tvm.runtime.artifact import read_artifact, write_artifact
from rotquant_tvm.runtime.cache_arrays import CacheArrays
from rotquant_tvm.runtime.cache_file import _checksum, read_cache_file, save_cache
from rotquant_tvm.runtime.cache_info import KVCacheInfo
from rotquant_tvm.window_ring import WindowRing

from .fuzzing import JSON_PIECES, PLAIN, changed, forms, fuzz, mutated

IDENTITY = "a" * 64
POLICY = CachePolicy(sinks=4, recent=8, center=64)
RING = WindowRing(96, POLICY)
INFO = {
    **{"version": 3, "layout_version": 1, "vocab_size": 260, "max_position": 4096, "dtype": "float32"},
    **{"weights": ["w"], "batch": 2, "max_batch": 4, "recordable": True},
    "layers": [
        {
            **{"kv_heads": 2, "head_dim": 32, "k": "hurwitz3", "v": "f16", "tile_bytes": 64},
            **{"policy": {"sinks": 4, "recent": 8, "center": 64, "defer": 0}},
            **{"window": RING.window, "tokens_kept": RING.tokens},
        }
    ],
}


def arrays(policy: CachePolicy = POLICY, rings=(RING,), tokens: int = 6) -> CacheArrays:
    """A cache of two sequences, of random bits."""
    rng = np.random.default_rng(1)
    shapes = [(2, 2, tokens, 5)] + ([(2, 2, 3, 9), (2, 2, 2, policy.slots, 32)] if policy.segmented else [])
    counts = [np.zeros(2, np.int32)] * (2 if policy.segmented else 1)
    layers = [rng.integers(0, 2**32, shape, dtype=np.uint32) for shape in shapes]
    return CacheArrays([tvm.runtime.tensor(x) for x in (*layers, *counts)], tvm.cpu(), policy, rings)


def filled() -> CacheArrays:
    """The same, holding 150 and 70 tokens."""
    cache = arrays()
    cache.advance(np.array([150, 70], np.int32))
    return cache


def take_up(path, cache: CacheArrays) -> bool:
    """Restore a file into an empty cache; False if it is refused. What is taken up is consistent."""
    try:
        saved = read_cache_file(path, IDENTITY)
        assert saved.batch >= 1 and saved.longest >= 0
        if saved.batch != cache.batch:
            return False
        saved.fill(cache)
    except ArtifactError as error:
        assert str(path.name) in str(error)
        return False
    np.testing.assert_array_equal(cache.lengths, cache.device_lengths())
    assert (cache.lengths >= 0).all() and (cache.counts()[0] >= 0).all()
    cache.shortest_crop()
    cache.crop(0)
    return True


def test_a_saved_cache_is_taken_up(tmp_path):
    save_cache(tmp_path / "valid", filled(), arrays(), IDENTITY)
    assert take_up(tmp_path / "valid", arrays())


@forms(40, 8_000)
def test_files_of_any_bytes(examples, tmp_path):
    save_cache(tmp_path / "valid", filled(), arrays(), IDENTITY)
    valid, path = (tmp_path / "valid").read_bytes(), tmp_path / "cache"
    header = valid[: 8 + struct.unpack("<Q", valid[:8])[0]]

    def check(content):
        path.write_bytes(content)
        take_up(path, arrays())

    lengths = st.integers(0, 2**64 - 1) | st.sampled_from((0, 1, 8, len(header) - 8, 100_000_000, 2**63, 2**64 - 1))
    headers = st.tuples(lengths, mutated(st.just(header[8:]), JSON_PIECES)).map(
        lambda pair: struct.pack("<Q", pair[0]) + pair[1] + valid[len(header) :]
    )
    fitting = mutated(st.just(header[8:]), JSON_PIECES).map(
        lambda text: struct.pack("<Q", len(text)) + text + valid[len(header) :]
    )
    fuzz("saved caches (bytes)", mutated(st.just(valid), JSON_PIECES) | headers | fitting, check, examples)


@forms(40, 8_000)
def test_files_with_true_checksums_and_any_arrays(examples, tmp_path):
    """A file that someone made: all of its checksums are right, its arrays and counts are anything."""
    path, whole = tmp_path / "cache", filled()
    tensors = {f"layer_{n:04d}": tensor.numpy() for n, tensor in enumerate(whole.layers)}
    tensors["counts"] = np.stack(whole.counts())

    def check(case):
        names, kind, numbers, metadata = case
        stored = dict(tensors)
        for name, (change, dtype) in names.items():
            if change is None:
                stored.pop(name, None)
            else:
                stored[name] = np.zeros(change, dtype)
        if kind and "counts" in stored:
            stored["counts"] = np.resize(np.array(numbers, np.int64).astype(np.int32), kind)
        made = {name: _checksum(array) for name, array in stored.items()}
        data = {"format": "rotquant-tvm-cache", "version": "1", "library": IDENTITY, "checksums": json.dumps(made)}
        safetensors.numpy.save_file(stored, path, {**data, **metadata})
        take_up(path, arrays())

    shape = st.lists(st.integers(0, 4), max_size=5).map(tuple)
    arrays_ = st.dictionaries(
        st.sampled_from([*tensors, "layer_9999", "x"]),
        st.tuples(st.none() | shape, st.sampled_from(("uint32", "float16", "int32", "int64", "bool", "uint8"))),
        max_size=2,
    )
    kinds = st.none() | st.sampled_from(((4, 2), (4, 2), (4, 2), (2, 2), (4, 1), (4, 0), (0, 2), (4,), (4, 2, 1)))
    numbers = st.lists(
        st.integers(-2, 300) | st.sampled_from((2**31 - 1, -(2**31), 2**31 - 64)), min_size=1, max_size=8
    )
    texts = st.dictionaries(
        st.sampled_from(("format", "version", "library", "checksums")), st.text(max_size=5), max_size=1
    )
    fuzz("saved caches (made)", st.tuples(arrays_, kinds, numbers, st.just({}) | texts), check, examples)


@forms(40, 8_000)
def test_what_a_library_says_of_its_cache(examples):
    def check(document):
        try:
            info = KVCacheInfo.from_json(json.dumps(document))
        except ArtifactError as error:
            assert str(error).startswith("kv_cache_info")
            return
        assert info.layers and info.bytes_per_token > 0 and info.cache_bytes(1, 100) > 0
        assert isinstance(info.rings, tuple) and info.policy.slots >= 1

    fuzz("kv_cache_info", changed(INFO) | PLAIN, check, examples)


@pytest.fixture
def folder(tmp_path):
    """An artifact without a library that could be loaded."""
    weights = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}
    spec = TokenizerSpec((1, 2), 0, "{{ x }}")
    write_artifact(
        tmp_path / "a", b"library", weights, kv_cache_info=INFO, target="llvm", tokenizer_json="{}", tokenizer=spec
    )
    return tmp_path / "a"


def open_artifact(folder) -> None:
    """Read an artifact, and all that it has."""
    try:
        artifact = read_artifact(folder)
        assert [array.dtype for _, array in artifact.weights()]
        artifact.tokenizer_json()
    except ArtifactError as error:
        assert str(error).strip() and error.exit_status == 4


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors"])
@forms(30, 5_000)
def test_an_artifacts_files_of_any_bytes(examples, folder, name):
    path = folder / name
    valid = path.read_bytes()

    def check(content):
        path.write_bytes(content)
        open_artifact(folder)

    fuzz(f"artifacts ({name})", mutated(st.just(valid), JSON_PIECES), check, examples)


@forms(40, 8_000)
def test_a_manifest_of_any_json(examples, folder):
    """Without its checksum, as someone with an editor would leave it."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    del document["checksum"]

    def check(content):
        path.write_text(json.dumps(content))
        open_artifact(folder)

    fuzz("artifacts (manifest as JSON)", changed(document), check, examples)


@forms(30, 5_000)
def test_weights_of_any_bytes_behind_a_true_manifest(examples, folder):
    """The manifest is made for what the weights' file holds now: reading it must not trust its header."""
    path, manifest = folder / "weights.safetensors", folder / "manifest.json"
    valid, document = path.read_bytes(), json.loads(manifest.read_text())
    size = struct.unpack("<Q", valid[:8])[0]

    def check(content):
        path.write_bytes(content)
        document["files"]["weights.safetensors"] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        manifest.write_text(json.dumps({key: value for key, value in document.items() if key != "checksum"}))
        open_artifact(folder)

    headers = mutated(st.just(valid[8 : 8 + size]), JSON_PIECES).map(
        lambda text: struct.pack("<Q", len(text)) + text + valid[8 + size :]
    )
    fuzz("weights (bytes)", headers | mutated(st.just(valid)), check, examples)


def test_a_saved_cache_without_counts_is_refused(tmp_path):
    stored = {"counts": np.zeros((0, 2), np.int32)}
    made = json.dumps({"counts": _checksum(stored["counts"])})
    data = {"format": "rotquant-tvm-cache", "version": "1", "library": IDENTITY, "checksums": made}
    safetensors.numpy.save_file(stored, tmp_path / "cache", data)
    with pytest.raises(ArtifactError, match=r"its counts are int32 \(0, 2\)"):
        read_cache_file(tmp_path / "cache", IDENTITY)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_nesting_beyond_pythons_bound_is_refused(folder, text):
    with pytest.raises(ArtifactError, match="not valid JSON"):
        KVCacheInfo.from_json(text)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="not valid JSON"):
        read_artifact(folder)
