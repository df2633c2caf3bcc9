"""The pass: tuned knobs reach the kernel, and what cannot be used is left to the rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
import tvm_ffi
from rotquant_tvm.schedules.kernel_by_size import choices_of
from rotquant_tvm.schedules.knobs import RECORD_ATTR, chosen_knobs, kernel_for, with_knobs
from rotquant_tvm.schedules.vector_kv_kernels import VectorKVKernels

from rotquant_tvm.codegen import compile_kernel, compile_module
from rotquant_tvm.kernel_report import layer_kernels
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.ops.site_shape import SiteShape
from rotquant_tvm.pass_hooks import PassHooks
from rotquant_tvm.pipeline import kv_passes, operator_passes, pass_context, run_passes
from rotquant_tvm.tuning import apply_records
from rotquant_tvm.tuning.apply_records import ApplyTuningRecords, with_record
from rotquant_tvm.tuning.bare_model import AttentionHeads, bare_model
from rotquant_tvm.tuning.log_store import read_log, write_log
from rotquant_tvm.tuning.record_lookup import TuningRecords
from rotquant_tvm.tuning.shape_buckets import WantedSizes
from rotquant_tvm.tuning.tuning_task import tuning_tasks, without_choice

from .conftest import HEADS


@pytest.fixture
def records(log_of, task, llvm, tmp_path):
    return TuningRecords(llvm, log_of(tmp_path, (task, {"splits": 16}, 0.5)))


def test_the_kernel_is_that_of_the_records_knobs(records, task, llvm):
    tuned = with_record(task.definition, records)
    assert chosen_knobs(tuned) == {"splits": 16} and "splits=16" in tuned.attrs[RECORD_ATTR]
    kernel = kernel_for(tuned, llvm)
    assert SiteShape.of(kernel).splits == 16 != SiteShape.of(task.definition).splits
    wanted = kernel_for(with_knobs(task.definition, {"splits": 16}), llvm)
    assert tvm_ffi.structural_equal(without_choice(kernel), without_choice(wanted))
    assert kernel.attrs[RECORD_ATTR] == tuned.attrs[RECORD_ATTR]  # the report reads it off the kernel


def test_the_pass_touches_only_what_has_a_record(records, definitions, llvm):
    functions = definitions()
    mod = tvm.IRModule({name: without_choice(func) for name, func in functions.items()})
    after = ApplyTuningRecords(llvm, records)(mod)
    for gvar, func in mod.functions_items():
        tuned = RECORD_ATTR in after[gvar.name_hint].attrs
        assert tuned == (gvar.name_hint == "attention_decode")
        assert tvm_ffi.structural_equal(without_choice(after[gvar.name_hint]), without_choice(func))


def test_the_compiled_kernel_computes_the_same(records, task, llvm, tmp_path):
    """Through ``compile_kernel``, with and without the record."""
    rng = np.random.default_rng(3)
    cache = rng.integers(0, 1 << 32, (2, 2, 6, 416), dtype=np.uint32)
    cache[..., 384:] = 0x3C003C00  # gains of 1
    inputs = [rng.standard_normal((2, 1, 4, 64)).astype("float32"), cache, np.array([192, 70], np.int32)]
    results = []
    for func, tuned in ((with_record(task.definition, records), True), (task.definition, False)):
        out = tvm.runtime.tensor(np.full((2, 1, 4, 64), np.nan, "float32"))
        compile_kernel(func, llvm, aligned=True, tuned=tuned)(*map(tvm.runtime.tensor, inputs), out)
        results.append(out.numpy())
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)


def test_a_choice_that_was_made_before_stays(records, task):
    chosen = with_knobs(task.definition, {"splits": 2})
    assert with_record(chosen, records).same_as(chosen)


def test_knobs_that_the_rule_does_not_know_are_left_to_it(log_of, task, llvm, tmp_path, monkeypatch):
    records = TuningRecords(llvm, log_of(tmp_path, (task, {"splits": 16}, 0.5)))
    monkeypatch.setattr(apply_records, "knob_values", lambda rule: {"splits": (1, 2)})
    assert with_record(task.definition, records).same_as(task.definition)
    assert "the rule decides" in records.warnings[0] and "splits=16" in records.warnings[0]


@pytest.mark.parametrize("answer", [None, ValueError("too much shared memory")])
def test_a_lent_record_that_the_rule_declines_is_left_to_it(records, definitions, monkeypatch, answer):
    func = definitions("hurwitz4")["attention_decode"]

    def kernel(*_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(apply_records, "kernel_for", kernel)
    assert with_record(func, records).same_as(func) and "the rule decides" in records.warnings[0]


def test_a_stale_record_is_used_with_a_warning(log_of, task, llvm, tmp_path):
    folder = log_of(tmp_path, (task, {"splits": 16}, 0.5))
    log = read_log(folder)
    old = [replace(entry, record=replace(entry.record, kernel_hash="0" * 16)) for entry in log.entries]
    write_log(folder, replace(log, entries=tuple(old)))
    records = TuningRecords(llvm, folder)
    assert chosen_knobs(with_record(task.definition, records)) == {"splits": 16}
    assert "changed since the record" in records.warnings[0]


def test_the_kernel_report_names_the_record(records, definitions, llvm):
    """As the compile's own modules would have it."""
    mod = tvm.IRModule({"kv_attention_decode": without_choice(definitions()["attention_decode"])})
    after = VectorKVKernels(llvm)(ApplyTuningRecords(llvm, records)(mod))
    assert layer_kernels(after, 1) == [[]]
    from rotquant_tvm import kernel_report

    source = kernel_report._source(after["kv_attention_decode"])
    assert source == "record: llvm-x86-64-v3, 1x1K: splits=16"


def test_llvm_knobs_change_nothing_else(task, llvm):
    """Every value of the knob builds, and the definition's own number of splits is one of the kernels."""
    (other,) = {t.rule for t in tuning_tasks([task.definition], llvm)}
    assert other == "attention_decode_llvm"
    own = SiteShape.of(task.definition).splits
    kernels = {n: kernel_for(with_knobs(task.definition, {"splits": n}), llvm) for n in task.knobs["splits"]}
    assert all(SiteShape.of(kernel).splits == n for n, kernel in kernels.items())
    plain = kernel_for(task.definition, llvm)
    assert tvm_ffi.structural_equal(without_choice(kernels[own]), without_choice(plain))


@pytest.fixture
def of_sizes(log_of, definitions, cuda, tmp_path):
    """A definition for GPUs, and records of it that choose differently."""
    definition = definitions("hurwitz3", replace(HEADS, dtype="float16"), cuda)["attention_decode"]
    tasks = {str(task.bucket["batch"]) + f"x{task.bucket['tiles']}": task for task in tuning_tasks([definition], cuda)}
    device = {"slug": "some-gpu", "name": "some GPU", "kind": "cuda", "arch": "sm_90a"}
    chosen = [("1x256", {"stages": 1}), ("1x1024", {}), ("8x1024", {"warps": 4}), ("64x64", {"stages": 1})]
    folder = log_of(tmp_path, *((tasks[name], knobs, 0.5) for name, knobs in chosen), device=device)
    return definition, TuningRecords(cuda, folder)


def test_a_kernel_that_will_see_other_sizes_has_the_knobs_of_all(of_sizes):
    definition, records = of_sizes
    tuned = with_record(definition, records, WantedSizes(None, 4096, others=True))
    assert [(bucket["batch"], bucket["tiles"], knobs) for bucket, knobs in sorted(choices_of(tuned), key=str)] == [
        (1, 1024, {}), (1, 256, {"stages": 1}), (64, 64, {"stages": 1}), (8, 1024, {"warps": 4}),
    ]  # fmt: skip
    assert all(f"{size}" in tuned.attrs[RECORD_ATTR] for size in ("1x8K: stages=1", "8x32K: warps=4", "64x2K"))
    assert not records.warnings
    kernel = kernel_for(tuned, records.target)
    assert kernel.script().count('launch_thread("blockIdx.x"') == 3
    assert kernel.attrs[RECORD_ATTR] == tuned.attrs[RECORD_ATTR]


@pytest.mark.parametrize(
    ("batch", "tiles"), [(1, {256, 1024}), (2, {256, 1024}), (4, {256, 1024}), (16, {64, 1024}), (64, {64})]
)
def test_a_known_number_of_sequences_leaves_those_near_to_it(of_sizes, batch, tiles):
    definition, records = of_sizes
    tuned = with_record(definition, records, WantedSizes(batch, 4096, others=True))
    match = records.lookup(definition, WantedSizes(batch, 4096))
    found = records.at_other_sizes(definition, match, WantedSizes(batch, 4096))
    assert {each.entry.record.bucket["tiles"] for each in found} == tiles
    assert len(choices_of(tuned)) == (len(tiles) if len(tiles) > 1 else 0)


def test_what_another_log_of_the_device_has_at_other_sizes_counts(of_sizes, log_of, tmp_path):
    """Of one size the log that comes first; nothing of another device."""
    definition, records = of_sizes
    tasks = {(task.bucket["batch"], task.bucket["tiles"]): task for task in tuning_tasks([definition], records.target)}
    own, device = records.logs[0].device, {"kind": "cuda", "arch": "sm_90a"}
    mine = log_of(tmp_path / "own", (tasks[1, 256], {"warps": 16}, 0.5), device=own | {"slug": records.logs[0].slug})
    device |= {"slug": "other-gpu", "name": "other"}
    log_of(tmp_path / "own", (tasks[64, 64], {"warps": 16}, 0.5), device=device)
    records._logs = [(0, log) for log in (read_log(mine), records.logs[0], read_log(mine.with_name("other-gpu")))]
    tuned = with_record(definition, records, WantedSizes(None, 8192, others=True))
    assert {(bucket["batch"], bucket["tiles"]): knobs for bucket, knobs in choices_of(tuned)} == {
        (1, 256): {"warps": 16}, (1, 1024): {}, (8, 1024): {"warps": 4}, (64, 64): {"stages": 1},
    }  # fmt: skip


def test_another_shape_borrows_the_records_of_all_sizes(of_sizes, definitions, cuda):
    _, records = of_sizes
    other = definitions("hurwitz3", AttentionHeads(6, 2, 64, "float16"), cuda)["attention_decode"]
    tuned = with_record(other, records, WantedSizes(None, 4096, others=True))
    assert len(choices_of(tuned)) == 4 and "tuned for" in tuned.attrs[RECORD_ATTR]
    assert kernel_for(tuned, cuda).script().count('launch_thread("blockIdx.x"') == 3


@pytest.mark.parametrize("bucket", [{}, {"x": 1}, {"batch": 1}])
def test_records_that_do_not_name_all_sizes_are_left_out(of_sizes, bucket):
    definition, records = of_sizes
    (log,) = [log for log in records.logs if log.slug == "some-gpu"]
    made = (replace(e, record=replace(e.record, bucket=bucket)) if e.record.knobs else e for e in log.entries)
    records._logs = [(0, replace(log, entries=type(log.entries)(made)))]
    tuned = with_record(definition, records, WantedSizes(None, 32768, others=True))
    assert choices_of(tuned) == [] and kernel_for(tuned, records.target) is not None


def test_one_size_alone_has_one_record(of_sizes):
    definition, records = of_sizes
    tuned = with_record(definition, records, WantedSizes(8, 32768))
    assert choices_of(tuned) == [] and chosen_knobs(tuned) == {"warps": 4}


def test_what_the_kernels_of_a_model_need_is_their_callers(of_sizes):
    """Through all passes: no kernel allocates global memory of its own."""
    _, records = of_sizes
    heads, config = replace(HEADS, dtype="float16"), KVCacheConfig.parse("hurwitz3")
    passes = kv_passes(config, records.target)
    passes += operator_passes(records.target, records, WantedSizes(None, 4096, others=True))
    with pass_context(PassHooks()):
        mod = run_passes(bare_model(heads), passes, records.target)
    (kernel,) = (func for gvar, func in mod.functions_items() if "attention_decode" in str(gvar.name_hint))
    assert isinstance(kernel.body, tvm.tirx.IfThenElse)
    assert kernel.script().count('launch_thread("blockIdx.x"') == 3
    compile_module(tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")}), records.target)
