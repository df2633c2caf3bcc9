"""Axes: which loops blocks and lanes become."""

from __future__ import annotations

import pytest
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T
from tvm_ffi import structural_walk

from rotquant_tvm.errors import UsageError
from rotquant_tvm.ops import Axes


def loops(axes: Axes, extent: int):
    """The (kind, extent) of the loops around one store, outermost first, and whether an If is among them."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("f")
        out = T.arg("out", T.buffer((8, extent), "float32"))
        with axes.blocks(8) as block, T.sblock("b"), axes.lanes(extent) as lane:
            T.buffer_store(out, tirx.const(0.0, "float32"), [block, lane])
    body, found, guarded = builder.get().body, [], []

    def note(loop):
        bound = loop.thread_binding
        tag = tirx.ForKind(loop.kind).name if bound is None else bound.thread_tag
        found.append((tag, int(loop.extent)))

    structural_walk(body, [(tirx.For, note), (tirx.IfThenElse, guarded.append)], order="pre")
    return found, bool(guarded)


def test_llvm_blocks_are_parallel_and_lanes_serial():
    found, guarded = loops(Axes("llvm"), 200)
    assert found == [("PARALLEL", 8), ("SERIAL", 200)] and not guarded
    assert Axes("llvm").scratch == "local"


@pytest.mark.parametrize(
    ("extent", "rounds", "guarded"), [(128, 1, False), (256, 2, False), (200, 2, True), (5, 1, True)]
)
def test_cuda_blocks_and_lanes_are_threads(extent, rounds, guarded):
    found, has_guard = loops(Axes("cuda"), extent)
    assert found == [("blockIdx.x", 8), ("SERIAL", rounds), ("threadIdx.x", 128)]
    assert has_guard == guarded
    assert Axes("cuda").scratch == "shared"


def test_of_reads_a_target_or_its_name():
    assert Axes.of("llvm -mcpu=x86-64") == Axes("llvm")
    assert Axes.of(tvm.target.Target({"kind": "cuda", "arch": "sm_80"}), threads=64) == Axes("cuda", 64)


def test_another_target_kind_is_refused():
    with pytest.raises(UsageError, match="unsupported target kind 'opencl'; use llvm or cuda"):
        Axes("opencl")
