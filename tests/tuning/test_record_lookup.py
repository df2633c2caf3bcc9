"""Which log serves a target, which record a kernel, and how far a record is lent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rotquant_tvm.errors import LogError
from rotquant_tvm.target import resolve_target
from rotquant_tvm.tuning import record_lookup
from rotquant_tvm.tuning.bare_model import AttentionHeads
from rotquant_tvm.tuning.log_folders import RECORD_FILE, user_logs
from rotquant_tvm.tuning.log_store import read_log, write_log
from rotquant_tvm.tuning.record_lookup import TuningRecords, log_rank
from rotquant_tvm.tuning.shape_buckets import WantedSizes
from rotquant_tvm.tuning.tuning_task import tuning_tasks

from .conftest import HEADS


@pytest.fixture(autouse=True)
def no_packaged_logs(monkeypatch, tmp_path):
    monkeypatch.setattr("rotquant_tvm.tuning.log_folders.packaged_logs", lambda: tmp_path / "packaged")


@pytest.fixture(scope="module")
def tasks_of(definitions, llvm):
    """Decode attention's tasks, smaller bucket first."""

    def of(kv_cache="hurwitz3", heads=HEADS):
        return tuning_tasks([definitions(kv_cache, heads)["attention_decode"]], llvm)

    return of


def splits(records, func, wanted=None):
    match = records.lookup(func, wanted)
    return None if match is None else match.knobs.get("splits")


def test_the_bucket_nearest_to_the_wanted_sizes(log_of, tasks_of, definitions, llvm, tmp_path):
    small, large = tasks_of()
    assert (small.bucket["tiles"], large.bucket["tiles"]) == (32, 128)
    records = TuningRecords(llvm, log_of(tmp_path, (small, {"splits": 2}, 0.5), (large, {"splits": 8}, 0.5)))
    func = definitions()["attention_decode"]
    for tokens, knob in ((64, 2), (1024, 2), (1900, 2), (2100, 8), (4096, 8), (1 << 20, 8)):
        assert splits(records, func, WantedSizes(tokens=tokens)) == knob
    match = records.lookup(func, WantedSizes(tokens=1024))
    assert match.exact and not match.stale
    assert match.source == "llvm-x86-64-v3, 1x1K: splits=2"


def test_other_shapes_take_the_nearest_record(log_of, tasks_of, definitions, llvm, tmp_path):
    near, far = tasks_of(heads=AttentionHeads(8, 4, 64, "float32"))[0], tasks_of("hurwitz2")[0]
    records = TuningRecords(llvm, log_of(tmp_path, (far, {"splits": 16}, 0.5), (near, {"splits": 4}, 0.5)))
    func = definitions("hurwitz3", AttentionHeads(16, 8, 64, "float32"))["attention_decode"]
    match = records.lookup(func)
    assert match.knobs == {"splits": 4} and not match.exact
    assert "tuned for hurwitz3 8/4x64 float32" in match.source
    assert splits(records, definitions("hurwitz2")["attention_decode"]) == 16


@pytest.mark.parametrize("kv_cache", ["q8_0", "hurwitz3+tcq"])
def test_what_shares_no_code_has_no_record(log_of, tasks_of, definitions, llvm, tmp_path, kv_cache):
    records = TuningRecords(llvm, log_of(tmp_path, (tasks_of()[0], {"splits": 2}, 0.5)))
    assert records.lookup(definitions(kv_cache)["attention_decode"]) is None
    assert records.lookup(definitions()["attention_prefill"]) is None  # a rule without knobs
    assert records.lookup(definitions()["append"]) is None  # no rule
    assert records.warnings == []


def test_a_record_may_say_that_the_rules_own_is_best(log_of, tasks_of, definitions, llvm, tmp_path):
    match = TuningRecords(llvm, log_of(tmp_path, (tasks_of()[0], {}, 1.0))).lookup(definitions()["attention_decode"])
    assert match.knobs == {} and match.source.endswith(": the rule's own knobs")


def test_the_order_of_folders(log_of, tasks_of, definitions, llvm, tmp_path):
    """What is given comes before the user's, and that before the packaged; but the same kernel before all."""
    func, (task, _), other = definitions()["attention_decode"], tasks_of(), tasks_of("hurwitz4")[0]
    log_of(tmp_path / "packaged", (task, {"splits": 1}, 0.1))
    assert splits(TuningRecords(llvm), func) == 1
    log_of(user_logs(), (task, {"splits": 2}, 0.5))
    assert splits(TuningRecords(llvm), func) == 2
    given = log_of(tmp_path / "given", (task, {"splits": 4}, 0.9))
    assert splits(TuningRecords(llvm, given), func) == splits(TuningRecords(llvm, given.parent), func) == 4
    relative = log_of(tmp_path / "relative", (other, {"splits": 8}, 0.5))
    assert splits(TuningRecords(llvm, relative), func) == 2


def test_a_folder_without_a_log_is_refused(llvm, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(LogError, match="has no tuning log"):
            TuningRecords(llvm, path)


def test_stale_records_are_used_and_told(log_of, tasks_of, definitions, llvm, tmp_path):
    folder = log_of(tmp_path, (tasks_of()[0], {"splits": 2}, 0.5))
    log = read_log(folder)
    old = [replace(entry, record=replace(entry.record, kernel_hash="0" * 16)) for entry in log.entries]
    write_log(folder, replace(log, entries=tuple(old)))
    match = TuningRecords(llvm, folder).lookup(definitions()["attention_decode"])
    assert match.stale and match.knobs == {"splits": 2} and "(stale)" in match.source


def test_records_of_another_rule_are_not_taken(log_of, tasks_of, definitions, llvm, tmp_path):
    folder = log_of(tmp_path, (tasks_of()[0], {"splits": 2}, 0.5))
    log = read_log(folder)
    other = [replace(entry, record=replace(entry.record, rule="attention_decode_gpu")) for entry in log.entries]
    write_log(folder, replace(log, entries=tuple(other)))
    assert TuningRecords(llvm, folder).lookup(definitions()["attention_decode"]) is None


def test_damage_is_a_warning_not_a_failure(log_of, tasks_of, definitions, llvm, tmp_path):
    func = definitions()["attention_decode"]
    folder = log_of(tmp_path / "one", (tasks_of()[0], {"splits": 2}, 0.5))
    (folder / RECORD_FILE).write_text("nonsense")
    records = TuningRecords(llvm, folder)
    assert records.lookup(func) is None and "damaged" in records.warnings[0]
    folder = log_of(tmp_path / "two", (tasks_of()[0], {"splits": 2}, 0.5))
    path = folder / RECORD_FILE
    path.write_text(path.read_text().replace("Annotate", "Anotate"))
    records = TuningRecords(llvm, folder)
    assert records.lookup(func) is None and "cannot be read" in records.warnings[0]


def test_cpus_are_served_by_their_level_and_those_below(log_of, tasks_of, tmp_path):
    log = read_log(log_of(tmp_path, (tasks_of()[0], {"splits": 2}, 0.5)))
    ranks = {cpu: log_rank(log, resolve_target(f"llvm -mcpu={cpu}")) for cpu in ("x86-64-v2", "x86-64-v3", "x86-64-v4")}
    assert ranks == {"x86-64-v2": None, "x86-64-v3": 0, "x86-64-v4": 1}


def test_a_log_made_with_many_more_threads_does_not_serve(log_of, tasks_of, llvm, monkeypatch, tmp_path):
    """How many parts a sequence is read in depends on how many threads there are."""
    log = read_log(log_of(tmp_path, (tasks_of()[0], {"splits": 2}, 0.5), device={"attributes": {"threads": 8}}))
    ranks = {}
    for threads in (1, 3, 4, 8, 16, 17):
        monkeypatch.setattr(record_lookup.tvm.runtime, "num_threads", lambda threads=threads: threads)
        ranks[threads] = log_rank(log, llvm)
    assert ranks == {1: None, 3: None, 4: 0, 8: 0, 16: 0, 17: None}


def test_gpus_have_their_own_log_or_their_architectures(log_of, tasks_of, cuda, llvm, monkeypatch, tmp_path):
    def log(name, arch):
        slug = record_lookup.slug_of(name)
        device = {"slug": slug, "name": name, "kind": "cuda", "arch": arch}
        return read_log(log_of(tmp_path / slug, (tasks_of()[0], {}, 1.0), device=device))

    h100, h200, a100 = log("NVIDIA H100 80GB HBM3", "sm_90a"), log("NVIDIA H200", "sm_90a"), log("A100", "sm_80")
    monkeypatch.setattr(record_lookup, "device_slug", lambda target: "nvidia-h200")
    assert [log_rank(entry, cuda) for entry in (h100, h200, a100)] == [1, 0, None]
    monkeypatch.setattr(record_lookup, "device_slug", lambda target: None)
    assert [log_rank(entry, cuda) for entry in (h100, h200, a100)] == [1, 1, None]
    assert log_rank(h100, llvm) is None


def test_the_log_of_another_device_is_used_if_it_is_named_itself(log_of, tasks_of, definitions, tmp_path):
    """A GPU of an architecture without logs may borrow one."""
    folder = log_of(tmp_path, (tasks_of()[0], {"splits": 2}, 0.5))
    older = resolve_target("llvm -mcpu=x86-64-v2")
    func = definitions(target=older)["attention_decode"]
    records = TuningRecords(older, folder)
    assert splits(records, func) == 2 and "another device" in records.warnings[0]
    assert splits(TuningRecords(older, folder.parent), func) is None


def test_the_users_folder_is_in_xdg_data_home(monkeypatch, tmp_path):
    assert user_logs() == tmp_path / "data" / "rotquant_tvm" / "tuning_logs"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert user_logs() == Path.home() / ".local/share/rotquant_tvm/tuning_logs"
