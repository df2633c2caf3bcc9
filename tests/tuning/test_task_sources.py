"""Tasks: from the passes over a model, or over a bare attention; each once."""

from __future__ import annotations

import pytest

from rotquant_tvm.benchmark.settings import BatchShape
from rotquant_tvm.errors import FormatError, UsageError
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.tuning.bare_model import AttentionHeads, bare_model
from rotquant_tvm.tuning.kernel_shape import KernelShape
from rotquant_tvm.tuning.task_sources import pass_definitions, vector_definitions
from rotquant_tvm.tuning.tuning_task import tuning_tasks

from ..passes.tiny_model import TinyModel


def test_a_bare_attention_has_the_operators_of_a_models(llvm):
    """The same kernels come out of the passes, layer count and weights apart."""
    tiny = TinyModel(heads=4, kv_heads=2, head_dim=32, scale=32**-0.5)
    bare = bare_model(AttentionHeads(4, 2, 32, "float32"))
    for kv_cache in ("hurwitz3", "rq3", "iso3/f16"):
        config = KVCacheConfig.parse(kv_cache)
        found = [
            {
                str(shape)
                for func in pass_definitions(mod, config, llvm)
                # Rotations before an append are folded into the weights of the one and have none in the other.
                if (shape := KernelShape.of(func)) and shape.operator not in ("append", "rotate")
            }
            for mod in (tiny.module(), bare)
        ]
        assert found[0] == found[1]


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UsageError, match="7 heads are no multiple of 2"):
        AttentionHeads(7, 2)


def test_a_head_dim_that_a_format_cannot_take(llvm):
    with pytest.raises(FormatError, match="head_dim 24"):
        pass_definitions(bare_model(AttentionHeads(2, 1, 24)), KVCacheConfig.parse("iso3"), llvm)


def test_tasks_have_rules_with_knobs_and_are_distinct(gpu_tasks):
    assert {task.shape.operator for task in gpu_tasks} >= {"attention_decode"}
    assert len({task.key() for task in gpu_tasks}) == len(gpu_tasks)
    for task in gpu_tasks:
        assert task.knobs and all(task.knobs.values()) and task.rule.endswith("_cuda")
        assert task.measurement.moved_bytes() > 0
        assert str(task.workload["main"].attrs["rotquant.kernel"]) == f"{task.rule}@{task.kernel_hash}"


def test_every_width_has_decode_at_every_bucket(gpu_tasks):
    decode = [task for task in gpu_tasks if task.shape.operator == "attention_decode"]
    assert {task.shape.formats for task in decode} == {"hurwitz2", "hurwitz3", "hurwitz4", "hurwitz3:ip/hurwitz3"}
    assert len({str(task.bucket) for task in decode if task.shape.formats == "hurwitz3"}) == 6


def test_formats_that_are_one_to_the_kernel_are_one_task(llvm):
    mod = bare_model(AttentionHeads(4, 2, 64, "float32"))
    configs = [KVCacheConfig.parse(name) for name in ("hurwitz3", "turbo3", "iso3")]
    functions = [func for config in configs for func in pass_definitions(mod, config, llvm)]
    tasks = tuning_tasks(functions, llvm, [BatchShape(1, 1024)])
    assert [task.shape.operator for task in tasks] == ["attention_decode"]


def test_vectors(cuda):
    tasks = tuning_tasks(vector_definitions(["hurwitz3"], 128, "float16", cuda), cuda)
    assert {task.bucket.get("n", task.bucket.get("n2")) for task in tasks} <= {8192, 1 << 20}
