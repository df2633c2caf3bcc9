"""A model's own work as tasks: which functions there are, how they are told apart, and that records reach them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tvm
import tvm_ffi
from rotquant_tvm.schedules.knobs import RECORD_ATTR, kernel_for
from rotquant_tvm.schedules.linear_cuda import CUDALinear
from rotquant_tvm.schedules.linear_rule_cuda import linear_shape
from tvm import relax, te, tirx

from rotquant_tvm.codegen import compile_module
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.ops.linear import LinearShape, linear
from rotquant_tvm.ops.model_op import model_op, model_properties
from rotquant_tvm.ops.rms_norm import rms_norm
from rotquant_tvm.pipeline import kv_passes, operator_passes, run_passes
from rotquant_tvm.tuning.apply_records import ApplyTuningRecords
from rotquant_tvm.tuning.arguments import Measurement, Parameter
from rotquant_tvm.tuning.kernel_shape import KernelShape
from rotquant_tvm.tuning.log_store import read_log, write_log
from rotquant_tvm.tuning.model_functions import as_model_function, definition_of
from rotquant_tvm.tuning.record_lookup import TuningRecords
from rotquant_tvm.tuning.shape_buckets import shapes_in
from rotquant_tvm.tuning.task_sources import model_definitions
from rotquant_tvm.tuning.tuning_task import tuning_tasks

from ..passes.tiny_model import TinyModel


@pytest.fixture(scope="module")
def module():
    return TinyModel(heads=4, kv_heads=2, head_dim=32, scale=32**-0.5).module()


@pytest.fixture(scope="module")
def tasks(module, llvm):
    found = tuning_tasks(model_definitions(module, KVCacheConfig.parse("hurwitz3"), llvm), llvm)
    return {operator: [task for task in found if task.shape.operator == operator] for operator in ("linear", "loops")}


def elementwise(size=7):
    n = tirx.Var("batch", "int64")
    a = te.placeholder((n, size), "float32", "a")
    b = te.placeholder((size,), "float32", "b")
    return te.create_prim_func([a, b, te.compute((n, size), lambda i, j: a[i, j] * b[j], "c")])


def test_loops_are_told_by_their_structure_alone():
    one, other = as_model_function(elementwise(), "fused_multiply3"), as_model_function(elementwise(), "multiply")
    assert model_op(one) == "loops" and model_properties(one)["results"] == 1
    first, second = KernelShape.of(one), KernelShape.of(other)
    assert first.distance(second) == 0 and first.essence() == second.essence() and first.label != "" != second.label
    different = KernelShape.of(as_model_function(elementwise(8), "multiply"))
    assert first.distance(different) is None
    assert model_properties(one)["loops"] == model_properties(other)["loops"] != different.properties["loops"]


def test_what_is_no_function_of_the_models_own():
    n = tirx.Var("n", "int64")
    a = te.placeholder((n, 6), "float32", "a")
    transposed = te.create_prim_func([a, te.compute((6, n), lambda i, j: a[j, i], "t")])
    assert as_model_function(transposed, "transpose") is None  # mostly a view in the end
    assert as_model_function(elementwise().with_attr("tirx.is_scheduled", True), "f") is None
    assert as_model_function(elementwise().with_attr("rotquant.op", "append"), "f") is None


def test_lookups_move_what_comes_out():
    n = tirx.Var("batch", "int64")
    table, ids = te.placeholder((1000, 8), "float32", "table"), te.placeholder((n,), "int32", "ids")
    func = te.create_prim_func([table, ids, te.compute((n, 8), lambda i, j: table[ids[i], j], "rows")])
    known = as_model_function(func, "take")
    assert model_properties(known)["gathered"] == [0]
    sizes = tuple(Parameter(*found) for found in shapes_in(known, {"batch": 10}))
    assert Measurement(KernelShape.of(known), sizes).moved_bytes() == 2 * 10 * 8 * 4 + 10 * 4


def test_definitions_of_laid_out_kernels():
    shape = LinearShape(64, (32,), (False,), False, False, 2, *["float32"] * 3, tile=16)
    laid_out = linear(shape).with_attrs({"rotquant.knobs": '{"rows": 4}'})
    assert KernelShape.of(definition_of(laid_out)) == KernelShape.of(linear(shape))
    assert str(definition_of(laid_out).attrs["rotquant.knobs"]) == '{"rows": 4}'
    assert tvm_ffi.structural_equal(definition_of(rms_norm(64, 1e-5, 2)), rms_norm(64, 1e-5, 2))
    func = elementwise()
    assert definition_of(func).same_as(func)


def test_tasks_of_a_model(tasks):
    assert tasks["linear"] and all(task.bucket == {"d0": 1, "d1": 512} for task in tasks["linear"])
    for task in (*tasks["linear"], *tasks["loops"]):
        assert task.knobs and task.measurement.moved_bytes() > 0 and task.measurement.results
        assert kernel_for(task.definition, task.target) is not None
        json.dumps([task.name, dict(task.shape.properties)])
    assert all(task.measurement.flops() > 0 for task in tasks["linear"])


def test_tasks_of_a_gpu(cuda):
    """As the passes of CUDA tag them: sizes of decode and of prefill have knobs of their own."""
    functions = [linear(linear_shape(CUDALinear(64, (64, 32), (False, False)))), rms_norm(64, 1e-5, 2)]
    functions.append(linear(linear_shape(CUDALinear(64, (4096,), (False,)))))
    found = tuning_tasks(functions, cuda)
    labels = [(task.shape.operator, task.bucket["d1"], sorted(task.knobs)[0]) for task in found]
    assert labels == [
        *(("linear", 1, "few_stages"), ("linear", 4096, "largest")),
        *(("rms_norm", 1, "threads"), ("rms_norm", 4096, "threads")),
        ("linear", 1, "few_stages"),  # an output layer, which works on one token of each row
    ]


def test_records_reach_the_compiled_kernels(tasks, module, llvm, log_of, tmp_path):
    """Through the passes of a compile; the kernel is another one, and computes the same."""
    linear_task, loop_task = tasks["linear"][0], max(tasks["loops"], key=lambda task: task.measurement.nbytes)
    folder = log_of(tmp_path, (linear_task, {"rows": 2}, 0.5), (loop_task, {"lanes": 4, "small": 0}, 0.5))
    steps = operator_passes(llvm)
    at = next(index for index, step in enumerate(steps) if isinstance(step, ApplyTuningRecords))
    with tvm.transform.PassContext(opt_level=3, disabled_pass=["RewriteDataflowReshape"]):
        fused = run_passes(module, [*kv_passes(KVCacheConfig.parse("hurwitz3"), llvm), *steps[:at]], llvm)
    records = TuningRecords(llvm, folder)
    tuned = ApplyTuningRecords(llvm, records)(fused)
    changed = [g.name_hint for g, f in tuned.functions_items() if f.attrs and RECORD_ATTR in f.attrs]
    assert len(changed) >= 2 and records.warnings == []
    for gvar, func in tuned.functions_items():
        if gvar.name_hint in changed:
            assert func.attrs["tirx.is_scheduled"] and not isinstance(func, relax.Function)
        elif isinstance(func, tirx.PrimFunc):
            assert tvm_ffi.structural_equal(func, fused[gvar.name_hint])
    results = []
    for func in (kernel_for(linear_task.definition, llvm), *(tuned[name] for name in changed if "linear" in name)):
        shape = LinearShape.read(model_properties(func))
        if KernelShape.of(func) != linear_task.shape:
            continue
        run = compile_module(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), llvm)["main"]
        rng = np.random.default_rng(0)
        sizes = [(1, 5, shape.in_features), shape.weight_shape]
        arrays = [rng.standard_normal(size).astype("float32") for size in sizes]
        arrays += [np.zeros((1, 5, n), "float32") for n in (shape.out_features[:1] if shape.residual else ())]
        outputs = [tvm.runtime.tensor(np.zeros((1, 5, n), "float32")) for n in shape.out_features]
        run(*map(tvm.runtime.tensor, arrays), *outputs)
        results.append(np.concatenate([output.numpy() for output in outputs], -1))
    assert len(results) == 2
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)


def test_records_of_two_sizes_are_taken_together(cuda, log_of, tmp_path):
    """Decode's record decides the knobs for few rows and prefill's those for many: one function serves both."""
    func = linear(linear_shape(CUDALinear(64, (64,), (False,))))
    decode, prefill = tuning_tasks([func], cuda)
    few = {"few_tiles": 2, "few_warps": 4, "few_steps": 1, "few_stages": 2}
    many = {"warpgroups": 1, "largest": 1, "stages": 3}
    gpu = {"slug": "nvidia-h100", "name": "NVIDIA H100", "kind": "cuda", "arch": "sm_90a"}
    folder = log_of(tmp_path, (decode, few, 0.5), (prefill, many, 0.5), device=gpu)
    records = TuningRecords(cuda, folder)
    match = records.lookup(func)
    assert match.knobs == few | many and match.exact and not match.stale
    assert "few_warps=4" in match.source and "stages=3" in match.source
    log = read_log(folder)
    old = [replace(entry, record=replace(entry.record, kernel_hash="0" * 16)) for entry in log.entries[:1]]
    write_log(folder, replace(log, entries=(*old, *log.entries[1:])))
    assert TuningRecords(cuda, folder).lookup(func).stale

