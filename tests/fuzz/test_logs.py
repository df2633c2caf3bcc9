"""Tuning logs of any content: they are read, looked up, merged and written again, or refused in one error."""

from __future__ import annotations

import json

from hypothesis import strategies as st
from tvm.target import Target

from rotquant_tvm.errors import LogError
from rotquant_tvm.tuning.log_diff import log_changes
from rotquant_tvm.tuning.log_document import MalformedLogError
from rotquant_tvm.tuning.log_folders import FORMAT, MANIFEST_FILE, RECORD_FILE, VERSION, WORKLOAD_FILE, log_folders
from rotquant_tvm.tuning.log_store import read_log, write_log
from rotquant_tvm.tuning.record_lookup import log_rank
from rotquant_tvm.tuning.shape_buckets import bucket_distance, bucket_label
from rotquant_tvm.tuning.trace_document import check_record, run_seconds, sizes, traced_knobs

from .fuzzing import JSON_PIECES, PLAIN, changed, forms, fuzz, mutated

PROPERTIES = {
    **{"k": "hurwitz3", "v": "hurwitz3", "heads": 4, "kv_heads": 2, "head_dim": 64, "scale": 0.125, "window": None},
    **{"dtype": "float32", "chunk": False, "splits": 1, "policy": "", "rotated": False, "softcap": None},
}
RECORDS = [
    {
        **{
            "operator": operator,
            "properties": properties,
            "bucket": {"batch": 1, "tiles": 32},
            "rule": f"{operator}_x",
        },
        **{"kernel_hash": "0", "knobs": {"splits": 2}, "seconds": 1e-6, "rule_seconds": 2e-6, "nbytes": 8},
        **{"share": 0.5, "trials": 3, "date": "2026-01-01"},
    }
    for operator, properties in (("attention_decode", PROPERTIES), ("rotate", {"structure": [[4, 1]], "head_dim": 64}))
]
DEVICE = {"slug": "llvm-x86-64-v3", "name": "a CPU", "kind": "llvm", "arch": "x86-64-v3", "attributes": {"threads": 2}}
MANIFEST = {
    **{"format": FORMAT, "version": VERSION, "device": DEVICE, "target": {"kind": "llvm", "mcpu": "x86-64-v3"}},
    **{"tvm": "0.27", "layout_version": 1, "copy_bandwidth": 1e10, "records": RECORDS},
}
TRACE = [
    [
        ["GetSBlock", [], ["root", "main"], ["b0"]],
        ["SampleCategorical", [], [[1, 2, 4], [0.4, 0.3, 0.3]], ["v1"]],
        ["Annotate", ["b0", "v1"], ["rotquant.knob.splits"], []],
    ],
    [[1, 1]],
]
TRIAL = [TRACE, [1e-6], {"kind": "llvm"}, [["TENSOR", "float32", [1, 1, 4, 64]], ["TENSOR", "int32", [1]]]]
LINES = "".join(json.dumps(line) + "\n" for line in ([0, TRIAL], [1, TRIAL]))
WORKLOADS = '["123","AAAA"]\n["456","BBBB"]\n'
FILES = {MANIFEST_FILE: json.dumps(MANIFEST), WORKLOAD_FILE: WORKLOADS, RECORD_FILE: LINES}
TARGETS = [
    Target({"kind": "llvm", "mcpu": "x86-64-v3"}),
    Target({"kind": "cuda", "arch": "sm_90a", "host": {"kind": "llvm"}}),
]


def write(folder, **files) -> None:
    """The example's files, or others in their place."""
    for name, content in (FILES | files).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def use(folder) -> bool:
    """Do with a log what commands do; False if it is refused."""
    try:
        log = read_log(folder)
    except LogError as error:
        assert str(error).strip()
        return False
    assert log_folders(folder) == [folder]
    for record in log.records:
        assert record.seconds > 0 and record.key and isinstance(record.shape.label, str)
        assert bucket_label(record.bucket) is not None and bucket_distance(record.bucket, {"batch": 2}) >= 0
        assert record.shape.distance(record.shape) == 0
    assert all(rank is None or rank >= 0 for rank in (log_rank(log, target) for target in TARGETS))
    assert {change.kind for change in log_changes(log, log)} <= {"same"}
    merged = log.merged(log.entries)
    write_log(folder, merged)
    assert read_log(folder).records == merged.records
    return True


def test_the_example_is_a_log(tmp_path):
    write(tmp_path)
    assert use(tmp_path)


@forms(40, 6_000)
def test_a_manifest_of_any_json(examples, tmp_path):
    def check(document):
        write(tmp_path, **{MANIFEST_FILE: json.dumps(document)})
        use(tmp_path)

    fuzz("tuning logs (manifest)", changed(MANIFEST), check, examples)


@forms(30, 6_000)
def test_files_of_any_bytes(examples, tmp_path):
    def check(case):
        write(tmp_path, **dict([case]))
        use(tmp_path)

    texts = st.sampled_from(sorted(FILES)).flatmap(
        lambda name: st.tuples(st.just(name), mutated(st.just(FILES[name].encode()), JSON_PIECES))
    )
    fuzz("tuning logs (bytes)", texts, check, examples)


@forms(80, 20_000)
def test_trials_of_any_json(examples):
    def check(document):
        for read in (check_record, traced_knobs, run_seconds, sizes):
            try:
                found = read(document)
            except MalformedLogError:
                continue
            if read is traced_knobs:
                assert all(isinstance(name, str) and isinstance(value, int) for name, value in found.items())

    fuzz("tuning trials", changed(TRIAL) | PLAIN, check, examples)


def test_a_device_has_some_threads(tmp_path):
    for threads in (None, 0, -2, 1.5, "2", True, [2]):
        device = DEVICE | {"attributes": {"threads": threads}}
        write(tmp_path, **{MANIFEST_FILE: json.dumps(MANIFEST | {"device": device})})
        assert not use(tmp_path), threads
