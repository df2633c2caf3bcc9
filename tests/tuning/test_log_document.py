"""Logs from anywhere: whatever is in them ends as a log or as one error, and never outside of its folder."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rotquant_tvm.errors import LogError
from rotquant_tvm.tuning import log_document
from rotquant_tvm.tuning.log_folders import FORMAT, MANIFEST_FILE, RECORD_FILE, VERSION, WORKLOAD_FILE, is_log
from rotquant_tvm.tuning.log_store import read_log

RECORD = {
    **{"operator": "append", "properties": {}, "bucket": {"batch": 1}, "rule": "r", "kernel_hash": "0"},
    **{"knobs": {"warps": 4}, "seconds": 1e-6, "rule_seconds": None, "nbytes": 8, "share": 0.5, "trials": 3},
    "date": "2026-01-01",
}
DEVICE = {"slug": "nvidia-h100", "name": "NVIDIA H100", "kind": "cuda", "arch": "sm_90a", "attributes": {}}
MANIFEST = {
    **{"format": FORMAT, "version": VERSION, "device": DEVICE, "target": {"kind": "cuda"}, "tvm": "0.27"},
    **{"layout_version": 1, "copy_bandwidth": None, "records": [RECORD]},
}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path)


def write(folder, manifest=MANIFEST, workloads="[1]\n", records="[0,[2]]\n"):
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    for name, content in ((MANIFEST_FILE, text), (WORKLOAD_FILE, workloads), (RECORD_FILE, records)):
        (folder / name).write_text(content)
    return folder


def test_the_example_is_a_log(folder):
    (entry,) = read_log(folder).entries
    assert vars(entry.record) == RECORD | {"flops": 0} and (entry.workload, entry.tuning_record) == ([1], [2])


@pytest.mark.parametrize("slug", ["../../etc", "/tmp/x", "a/b", "", ".", "..", "a\n", "x" * 200, "A", 7, None])
def test_a_slug_is_a_plain_name(folder, slug):
    write(folder, MANIFEST | {"device": DEVICE | {"slug": slug}})
    with pytest.raises(LogError, match="'slug' of its device"):
        read_log(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, None) for name in RECORD if name not in ("rule_seconds", "share")),
        ("seconds", 0),
        ("seconds", -1.0),
        ("bucket", {"batch": 0}),
        ("date", "2026\x1b[2J"),
        ("operator", "x" * 2000),
        ("properties", {"a": [[[[[[[1]]]]]]]}),
        ("properties", {"a": 2**70}),
        ("seconds", True),
        ("bucket", {"batch": "1"}),
        ("knobs", {"warps": 1.5}),
        ("knobs", {"warps": 10**30}),
        ("share", "0.5"),
        ("nbytes", 1.5),
        ("nbytes", -1),
        ("trials", -3),
        ("flops", -1),
        ("share", -0.5),
        ("extra", 1),
    ],
)
def test_every_entry_of_a_record_is_checked(folder, name, value):
    write(folder, MANIFEST | {"records": [RECORD | {name: value}]})
    with pytest.raises(LogError, match=f"{name!r}"):
        read_log(folder)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "9" * 5000])
def test_numbers_that_are_none(folder, number):
    write(folder, json.dumps(MANIFEST).replace("1e-06", number))
    with pytest.raises(LogError, match="not JSON"):
        read_log(folder)


@pytest.mark.parametrize(
    "properties",
    [
        {"heads": "x"},
        {"heads": 0, "kv_heads": 8},
        {"heads": 8, "kv_heads": 0},
        {"heads": -1},
        {"structure": 7},
        {"structure": [[1]]},
        {"k": 7, "head_dim": "x"},
        {"out_features": 5, "in_features": 1},
        {"policy": {}},
    ],
)
def test_properties_that_make_no_sense(folder, properties):
    """They are compared and shown: neither may fail later."""
    write(folder, MANIFEST | {"records": [RECORD | {"properties": properties}]})
    try:
        (record,) = read_log(folder).records
    except LogError as error:
        assert "properties of record 0 make no sense" in str(error)
    else:
        assert record.key and isinstance(record.shape.label, str) and record.shape.distance(record.shape) == 0


@pytest.mark.parametrize(
    "target",
    [{"kind": "llvm", "cl-opt": ["-info-output-file=/tmp/x"]}, {"kind": "cuda", "host": {"kind": "llvm", "jit": "x"}}],
)
def test_a_target_says_what_a_device_is_and_nothing_else(folder, target):
    """LLVM's own options, for one, name files to write."""
    write(folder, MANIFEST | {"target": target})
    with pytest.raises(LogError, match="'target' of the manifest"):
        read_log(folder)


def test_optional_entries(folder):
    write(folder, MANIFEST | {"product_rate": 1e12, "records": [RECORD | {"flops": 7}]})
    log = read_log(folder)
    assert log.product_rate == 1e12 and log.records[0].flops == 7
    for change in ({"product_rate": "fast"}, {"records": [RECORD | {"flops": None}]}):
        write(folder, MANIFEST | change)
        with pytest.raises(LogError, match="damaged"):
            read_log(folder)


@pytest.mark.parametrize("name", [MANIFEST_FILE, WORKLOAD_FILE, RECORD_FILE])
def test_what_is_no_plain_file_is_not_waited_for(folder, name):
    """A pipe has no end, and /dev/zero neither."""
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(LogError, match="no plain file"):
        read_log(folder)
    assert is_log(folder) == (name != MANIFEST_FILE)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(LogError, match="no plain file"):
        read_log(folder)
    assert is_log(folder) == (name != MANIFEST_FILE)


@pytest.mark.parametrize("name", [name for name in MANIFEST if name not in ("format", "version")])
def test_every_entry_of_a_manifest_is_needed(folder, name):
    write(folder, {key: value for key, value in MANIFEST.items() if key != name})
    with pytest.raises(LogError, match=f"no entry {name!r}"):
        read_log(folder)


@pytest.mark.parametrize("line", ["[1,[2]]", "[-1,[2]]", "[true,[2]]", "[0]", "0", "{}", '["0",[2]]', "[0,[2],3]"])
def test_a_record_names_its_workload(folder, line):
    write(folder, records=line)
    with pytest.raises(LogError, match="names no workload"):
        read_log(folder)


@pytest.mark.parametrize("name", [MANIFEST_FILE, WORKLOAD_FILE, RECORD_FILE])
@pytest.mark.parametrize(
    ("content", "said"), [(b"[" * 200_000, "nested too deeply"), (b"\xff\xfe", "no text"), (b"{", "not JSON")]
)
def test_hostile_files_are_one_error(folder, name, content, said):
    (folder / name).write_bytes(content)
    with pytest.raises(LogError, match=said):
        read_log(folder)


def test_a_file_is_not_read_beyond_its_bound(folder, monkeypatch):
    monkeypatch.setattr(log_document, "MAX_BYTES", 100)
    with pytest.raises(LogError, match="larger than 100 bytes"):
        read_log(folder)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*RECORD, *DEVICE]), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*MANIFEST]), PLAIN, st.sampled_from([*RECORD]), PLAIN, st.sampled_from([*DEVICE]), PLAIN)
def test_any_json_ends_in_a_log_or_one_error(tmp_path, entry, value, field, content, device, what):
    changed = {"records": [RECORD | {field: content}], "device": DEVICE | {device: what}}
    for manifest in (MANIFEST | changed, MANIFEST | {entry: value}, value):
        write(tmp_path, manifest)
        try:
            log = read_log(tmp_path)
        except LogError:
            continue
        assert log.slug.replace("-", "").replace(".", "").replace("_", "").isalnum()
        assert all(record.seconds > 0 and record.key for record in log.records)
