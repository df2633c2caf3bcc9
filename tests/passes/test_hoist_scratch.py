from __future__ import annotations

import numpy as np
import tvm
import tvm.tirx as tir
from rotquant_tvm.passes.hoist_scratch import HoistScratch
from tvm import relax
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.codegen import COUNTERS_ATTR

from .simulated_function import calls, simulate


def doubling(counters=0, scratch=True):
    """y = 2 x [n, 32] by way of global memory of its own; ``inplace`` kernels write x itself."""
    with IRBuilder() as builder, T.prim_func(s_tir=False, is_private=True):
        T.func_attr({"tirx.noalias": True} | ({COUNTERS_ATTR: counters} if counters else {}))
        n = tir.Var("n", "int64")
        x = T.arg("x", T.buffer((n, 32), "float32"))
        if counters:
            count = T.arg("counters", T.buffer((counters,), "int32"))
        y = T.arg("y", T.buffer((n, 32), "float32"))
        memory = T.alloc_buffer((n * 2, 32), "float32", scope="global") if scratch else None
        with T.launch_thread("blockIdx.x", n) as block, T.launch_thread("threadIdx.x", 32) as thread:
            value = x[block, thread] * tir.const(2.0, "float32")
            if counters:
                value = value + count[0].astype("float32")
            if scratch:
                T.buffer_store(memory, value, [block * 2, thread])
                value = memory[block * 2, thread]
            T.buffer_store(y, value, [block, thread])
    return builder.get()


def module(kernel) -> tvm.IRModule:
    """Two calls, one after the other, of a definition in whose place the kernel has been put."""
    size = relax.TensorType((tir.Var("m", "int64"), 32), "float32")
    x = relax.Var("x", size)
    bb = relax.BlockBuilder()
    with bb.function("main", [x]):
        gvar = bb.add_func(doubling(scratch=False), "doubling")
        with bb.dataflow():
            y = bb.emit(relax.call_tir(gvar, [x], size))
            out = bb.emit_output(relax.call_tir(gvar, [y], size))
        bb.emit_func_output(out)
    mod = bb.get()
    mod.update_func(gvar, kernel)
    return mod


def test_scratch_becomes_a_result_of_the_caller():
    mod = module(doubling())
    after = HoistScratch()(mod)
    assert "alloc_buffer" not in after["doubling"].script() and len(after["doubling"].params) == 3
    types = [binding.value.ty for block in after["main"].body.blocks for binding in block.bindings]
    fields = [list(type_.fields) for type_ in types if hasattr(type_, "fields")]
    assert len(fields) == 2 and all(str(second.shape[0]) == "m * T.int64(2)" for _, second in fields)
    x = np.arange(96, dtype="float32").reshape(3, 32)
    np.testing.assert_array_equal(simulate(after, [x]), 4 * x)


def test_counters_are_a_constant_of_zeros():
    after = HoistScratch()(module(doubling(counters=8)))
    assert calls(after["main"]) == ["doubling", "doubling"] and len(after["doubling"].params) == 4
    x = np.ones((2, 32), "float32")
    np.testing.assert_array_equal(simulate(after, [x]), 4 * x)


def test_kernels_without_either_stay():
    mod = module(doubling(scratch=False))
    tvm.ir.assert_structural_equal(HoistScratch()(mod), mod)
