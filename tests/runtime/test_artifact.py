"""The artifact: what is written is read back, damage is found and named, writing is all or nothing."""

from __future__ import annotations

import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rotquant_tvm.runtime.artifact as artifact_module
import rotquant_tvm.runtime.library as library_module
from rotquant_tvm import staging
from rotquant_tvm.errors import ArtifactError, UsageError
from rotquant_tvm.runtime import TokenizerSpec, check_output, load, read_artifact, write_artifact

NEEDS = {"machine": "x86_64", "cpu": {"name": "x86-64-v3", "features": ["avx2"]}, "cuda": None}
FILES = ["model.so", "weights.safetensors", "tokenizer.json", "manifest.json"]


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def edit_manifest(path, change):
    """Change the manifest as someone with an editor would who also drops the checksum."""
    document = json.loads((path / "manifest.json").read_text())
    document.pop("checksum")
    change(document)
    (path / "manifest.json").write_text(json.dumps(document))


def refused(path, *fragments):
    with pytest.raises(ArtifactError) as error:
        load(path)
    assert error.value.exit_status == 4
    for fragment in fragments:
        assert fragment in str(error.value)


def test_what_is_written_is_read_back(artifact, fake_model, tokenizer_json):
    assert sorted(os.listdir(artifact)) == sorted(FILES)
    opened = read_artifact(artifact)
    assert opened.manifest.info.document == fake_model.INFO
    assert opened.manifest.report == {"layers": 2} and opened.manifest.default_capacity == 128
    assert opened.manifest.tokenizer.eos_token_ids == (257,)
    assert opened.tokenizer_json() == tokenizer_json
    stored, expected = dict(opened.weights()), fake_model.weights()
    assert list(stored) == list(expected)
    for name, array in expected.items():
        assert stored[name].dtype == array.dtype
        np.testing.assert_array_equal(stored[name], array)


def test_the_manifest_has_the_documented_entries(artifact):
    document = json.loads((artifact / "manifest.json").read_text())
    assert document["format"] == "rotquant-tvm-artifact" and document["version"] == 2
    assert set(document["files"]) == set(FILES) - {"manifest.json"}
    for name, record in document["files"].items():
        assert record["bytes"] == (artifact / name).stat().st_size and len(record["sha256"]) == 64
    assert document["tokenizer"]["file"] == "tokenizer.json"
    assert document["versions"]["tvm"].startswith("0.27") and document["requires"] is None


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64"]),
    transpose=st.booleans(),
)
def test_weights_of_any_shape_and_dtype_survive(tmp_path, fake_model, shape, dtype, transpose):
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(kind)
    array = array.T if transpose else array
    info = fake_model.INFO | {"weights": ["w"]}
    write_artifact(tmp_path / "a", b"library", {"w": array}, kv_cache_info=info, target="llvm")
    [(name, stored)] = read_artifact(tmp_path / "a").weights()
    assert name == "w" and stored.dtype == kind and stored.shape == array.shape
    np.testing.assert_array_equal(stored, array)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_a_flipped_bit_anywhere_is_found(artifact, name, place):
    size = (artifact / name).stat().st_size
    flip(artifact / name, int(place * size) if place == 0.5 else place)
    refused(artifact, name)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_found_even_without_checksums(artifact, name):
    data = (artifact / name).read_bytes()
    (artifact / name).write_bytes(data[: len(data) // 2])
    refused(artifact, name)
    with pytest.raises(ArtifactError, match=name):
        load(artifact, verify=False)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(artifact, name):
    (artifact / name).unlink()
    refused(artifact, name, "missing")


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda m: m.update(version=1), ("version is 1", "reads 2", "compile the model again")),
        (lambda m: m.update(version=True), ("version is True",)),
        (lambda m: m["kv_cache_info"].update(layout_version=7), ("layout_version is 7",)),
        (lambda m: m["kv_cache_info"].update(version=None), ("kv_cache_info", "version is None")),
        (lambda m: m["versions"].update({"tvm": "0.26.0"}), ("tvm 0.26.0", "tvm 0.27", "compile the model again")),
        (lambda m: m["versions"].update({"tvm-ffi": "0.2.0"}), ("tvm-ffi 0.2.0", "compile the model again")),
        (lambda m: m["versions"].pop("tvm"), ("versions", "no entry 'tvm'")),
        (lambda m: m.update(requires=3), ("'requires' is 3",)),
        (lambda m: m.update(requires={"machine": "x86_64"}), ("requires", "no entry 'cpu'")),
        (lambda m: m.update(requires=NEEDS | {"cuda": {"arch": "sm_x", "code": "cubin"}}), ("requires", "sm_x")),
        (lambda m: m.update(codecs={"arrays": {}}), ("'codecs'", "disagree")),
        (lambda m: m["files"].update({"codecs.safetensors": {"bytes": 1, "sha256": "0"}}), ("disagree",)),
        (lambda m: m.update(tuning_records=[3]), ("tuning_records",)),
        (lambda m: m.update(format="other"), ("not the manifest",)),
        (lambda m: m.pop("kv_cache_info"), ("no entry 'kv_cache_info'",)),
        (lambda m: m.pop("target"), ("no entry 'target'",)),
        (lambda m: m["files"].pop("model.so"), ("lists no model.so",)),
        (lambda m: m["files"].update({"../../etc/passwd": {}}), ("passwd",)),
        (lambda m: m["files"]["model.so"].update(bytes="many"), ("'bytes' is 'many'",)),
        (lambda m: m["files"]["model.so"].pop("sha256"), ("no entry 'sha256'",)),
        (lambda m: m["kv_cache_info"].update(layers=[]), ("layers",)),
        (lambda m: m["kv_cache_info"]["layers"][1].update(kv_heads=0), ("layers[1]", "kv_heads")),
        (lambda m: m["kv_cache_info"].update(vocab_size=0), ("vocab_size",)),
        (lambda m: m["kv_cache_info"].update(weights=["weight_0000", "weight_0009"]), ("lacks weight_0009",)),
        (lambda m: m["kv_cache_info"].update(vocab_size=261), ("model.so", "not the library")),
        (lambda m: m["tokenizer"].update(eos_token_ids="x"), ("eos_token_ids",)),
        (lambda m: m["tokenizer"].update(chat_template="{% if %}"), ("chat template",)),
        (lambda m: m.update(tokenizer=3), ("tokenizer",)),
        (lambda m: m.update(default_capacity=0), ("default_capacity",)),
        (lambda m: m.update(report=[]), ("report",)),
    ],
)
def test_manifests_that_do_not_fit_are_refused(artifact, change, fragments):
    edit_manifest(artifact, change)
    refused(artifact, *fragments)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\x00", "{}"])
def test_a_manifest_that_is_none_is_refused(artifact, content):
    (artifact / "manifest.json").write_text(content)
    refused(artifact, "manifest.json")


def test_a_manifest_that_is_not_utf8_is_refused(artifact):
    (artifact / "manifest.json").write_bytes(b"\xff\xfe{}")
    refused(artifact, "manifest.json")


def test_an_edited_manifest_is_noticed(artifact):
    text = (artifact / "manifest.json").read_text()
    (artifact / "manifest.json").write_text(
        text.replace('"default_capacity": 128', '"default_capacity": 129')
    )
    refused(artifact, "manifest.json", "checksum")


def test_paths_that_are_no_artifact_are_refused(tmp_path):
    refused(tmp_path / "nothing", "does not exist")
    refused(tmp_path, "manifest.json is missing")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")


def test_a_library_of_another_machine_is_refused(write, tmp_path):
    path = write(tmp_path / "model.rq", library=b"\x7fELF not really")
    refused(path, "model.so", "cannot be loaded")


@pytest.mark.parametrize("why", ["failed to map segment from shared object", "Cannot allocate memory"])
def test_a_library_that_memory_has_no_room_for_need_not_be_compiled_again(artifact, monkeypatch, why):
    def full(path):
        raise RuntimeError(f"{path}: {why}")

    monkeypatch.setattr(library_module, "load_module", full)
    refused(artifact, "model.so", "cannot be loaded", why, "free memory")


def test_an_artifact_is_replaced_whole(artifact, write, tmp_path):
    (artifact / "leftover").write_text("of the old one")
    write(artifact, tokenizer_json=None, tokenizer=TokenizerSpec(), report={"new": 1})
    assert sorted(os.listdir(artifact)) == ["manifest.json", "model.so", "weights.safetensors"]
    assert load(artifact).report == {"new": 1}
    assert os.listdir(tmp_path) == [artifact.name]


def test_parent_folders_are_made_and_links_followed(write, tmp_path):
    path = write(tmp_path / "a" / "b" / "model.rq")
    assert load(path).batch == 1
    (tmp_path / "link").symlink_to(path)
    write(tmp_path / "link", report={"new": 1})
    assert load(path).report == {"new": 1} and (tmp_path / "link").is_symlink()


def failing_library(path):
    with open(path, "wb") as file:
        file.write(b"half")
    raise RuntimeError("the linker died")


def test_a_failing_compile_leaves_no_trace(artifact, write, tmp_path):
    before = {name: (artifact / name).read_bytes() for name in os.listdir(artifact)}
    for path in (artifact, tmp_path / "new.rq", tmp_path / "new" / "folders" / "new.rq"):
        with pytest.raises(RuntimeError, match="linker died"):
            write(path, library=failing_library)
    assert os.listdir(tmp_path) == [artifact.name]
    assert before == {name: (artifact / name).read_bytes() for name in os.listdir(artifact)}


@pytest.mark.parametrize("failing", ["save_file", "rename"])
def test_a_full_disk_leaves_the_old_artifact(artifact, write, tmp_path, monkeypatch, failing):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing == "save_file":
        monkeypatch.setattr(artifact_module.safetensors.numpy, "save_file", full)
    else:
        rename = artifact_module.Path.rename
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
        monkeypatch.setattr(
            artifact_module.Path,
            "rename",
            lambda self, target: full() if self.suffix == ".partial" else rename(self, target),
        )
    with pytest.raises(UsageError, match=r"cannot write .*model\.rq: No space left"):
        write(artifact, report={"new": 1})
    monkeypatch.undo()
    assert load(artifact).report == {"layers": 2}
    assert os.listdir(tmp_path) == [artifact.name]


def test_other_files_are_never_overwritten(write, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    write(folder)  # an empty folder may become the artifact
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for path in (tmp_path / "notes.txt", tmp_path / "full", tmp_path / "notes.txt" / "model.rq"):
        for action in (write, check_output):
            with pytest.raises(UsageError, match="choose another output") as error:
                action(path)
            assert error.value.exit_status == 2
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "full" / "mine").read_text() == "mine"


def test_outputs_that_could_be_written_pass_the_check(artifact, tmp_path):
    check_output(artifact)
    check_output(tmp_path / "not" / "yet" / "there")
    assert os.listdir(tmp_path) == [artifact.name]


def test_weights_and_their_names_must_agree(write, fake_model, tmp_path):
    weights = fake_model.weights()
    for odd in ({"weight_0000": weights["weight_0000"]}, weights | {"extra": np.zeros(1)}):
        with pytest.raises(UsageError, match=r"weight_0001|extra"):
            write(tmp_path / "model.rq", weights=odd)
    assert not os.listdir(tmp_path)
