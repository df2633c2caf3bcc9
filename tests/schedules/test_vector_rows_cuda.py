"""The loop over rows: each row once, whatever their number and the grid."""

from __future__ import annotations

import numpy as np
import pytest
import tvm.tirx as tir
from rotquant_tvm.schedules.cuda_ops import WARP, Registers
from rotquant_tvm.schedules.vector_rows_cuda import RowLoop
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from .simulated_gpu import SimulatedGPU, cuda_target

LANES = 8


def copies(total, rows, warps, blocks, early):
    """A kernel that adds each row's number, as it was read, to the row's output."""
    n = tir.Var("n", "int64")
    loop = RowLoop(n, WARP // LANES, cuda_target(), rows=rows, warps=warps, blocks=blocks, early=early)
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("copies")
        x, y = (T.arg(name, T.buffer((n,), "int32")) for name in "xy")
        with T.launch_thread("blockIdx.x", loop.grid) as block, T.launch_thread("threadIdx.x", WARP * warps) as thread:
            group = thread % WARP // LANES
            ahead, now = Registers(rows, "int32"), Registers(rows, "int32")

            def load(k, row):
                ahead[k] = x[row]

            def work():
                for k in range(rows):
                    now[k] = ahead[k]
                loop.read_next()

                def store(k, row):
                    with T.If(thread % LANES == 0), T.Then():
                        T.buffer_store(y, y[row] + now[k], [row])

                loop.each_row(store)

            loop.start(block, thread, group, load, lambda: None)
            loop.run(work)
    x, y = np.arange(total, dtype=np.int32) + 1, np.zeros(total, np.int32)
    SimulatedGPU(builder.get())(x, y)
    return x, y


@pytest.mark.parametrize("early", [0, 1])
@pytest.mark.parametrize("total", [1, 3, 4, 5, 31, 64, 257])
@pytest.mark.parametrize(("rows", "warps", "blocks"), [(1, 1, 1), (1, 4, 1000), (2, 2, 3), (4, 1, 2)])
def test_each_row_once(total, rows, warps, blocks, early):
    x, y = copies(total, rows, warps, blocks, early)
    np.testing.assert_array_equal(x, y)
