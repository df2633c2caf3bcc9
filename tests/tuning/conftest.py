"""Targets, a small kernel with knobs, and logs that no device had to be measured for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tvm
from tvm.s_tir import meta_schedule as ms

from rotquant_tvm.formats import VERSION as LAYOUT_VERSION
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.target import resolve_target
from rotquant_tvm.tuning.bare_model import AttentionHeads, bare_model
from rotquant_tvm.tuning.default_caches import DEFAULT_CACHES
from rotquant_tvm.tuning.device_identity import DeviceIdentity
from rotquant_tvm.tuning.knob_space import knob_space, schedule_with
from rotquant_tvm.tuning.log_store import TuningLog, write_log
from rotquant_tvm.tuning.roofline import Roofline
from rotquant_tvm.tuning.task_sources import pass_definitions
from rotquant_tvm.tuning.trace_document import FAILED_SECONDS
from rotquant_tvm.tuning.trials import Trial, best_entry
from rotquant_tvm.tuning.tuning_task import tuning_tasks

HEADS = AttentionHeads(heads=4, kv_heads=2, head_dim=64, dtype="float32")
GPU = {"kind": "cuda", "arch": "sm_90a", "max_shared_memory_per_block": 232448, "max_threads_per_block": 1024}
GPU |= {"thread_warp_size": 32, "max_num_threads": 1024, "host": "llvm"}


@pytest.fixture(autouse=True)
def no_user_logs(tmp_path, monkeypatch):
    """No test sees or writes the user's own logs."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture(scope="session")
def llvm():
    """The x86-64 level that logs for CPUs are kept for."""
    return resolve_target("llvm -mcpu=x86-64-v3")


@pytest.fixture(scope="session")
def cuda():
    """An H100, which need not be there."""
    return tvm.target.Target(GPU)


@pytest.fixture(scope="session")
def gpu_tasks(cuda):
    """What is tuned on a GPU where no model says it."""
    mod = bare_model(AttentionHeads())
    functions = [f for text in DEFAULT_CACHES for f in pass_definitions(mod, KVCacheConfig.parse(text), cuda)]
    return tuning_tasks(functions, cuda)


@pytest.fixture(scope="session")
def definitions(llvm):
    """The operators of a small attention, by name; ``of(kv_cache, heads, target)`` makes others."""

    def of(kv_cache="hurwitz3", heads=HEADS, target=llvm):
        found = pass_definitions(bare_model(heads), KVCacheConfig.parse(kv_cache), target)
        return {str(func.attrs["rotquant.op"]): func for func in found}

    return of


@pytest.fixture(scope="session")
def task(definitions, llvm):
    """Decode attention at the smaller of its buckets."""
    return tuning_tasks([definitions()["attention_decode"]], llvm)[0]


def trial(task, knobs, seconds):
    """A trial as MetaSchedule records it."""
    sch = schedule_with(task.workload, schedule_with_space(task, knobs), knobs)
    workload = ms.database.Workload(task.workload)
    times = [min(seconds, FAILED_SECONDS)]
    record = ms.database.TuningRecord(sch.trace, workload, times, task.target, task.args_info)
    return Trial(knobs, seconds, record.as_json())


def schedule_with_space(task, names=None):
    """The trace of a task's design space, or of the knobs ``names`` alone."""
    sch = tvm.s_tir.Schedule(task.workload)
    knob_space({name: task.knobs[name] for name in task.knobs if names is None or name in names})(sch)
    return sch.trace


def write_results(root, *results, device=None, bandwidth=1e11):
    """Write a log with one entry per (task, knobs, seconds), of a CPU or of ``device``; returns its folder."""
    entries = [
        best_entry(task, [trial(task, {}, 1.0), *([trial(task, knobs, seconds)] if knobs else [])], Roofline(bandwidth))
        for task, knobs, seconds in results
    ]
    target = results[0][0].target
    identity = replace(DeviceIdentity("llvm-x86-64-v3", "a CPU", "llvm", "x86-64-v3"), **(device or {}))
    known = {"kind": target.kind.name} | {n: str(target.attrs[n]) for n in ("mcpu", "arch") if n in target.attrs}
    log = TuningLog(identity.document(), known, tvm.__version__, LAYOUT_VERSION, bandwidth).merged(entries)
    write_log(root / identity.slug, log)
    return root / identity.slug


@pytest.fixture
def log_of():
    """``write_results``."""
    return write_results
