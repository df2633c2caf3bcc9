from __future__ import annotations

import numpy as np
import tvm
from rotquant_tvm.schedules.schedule_for_llvm import schedule
from rotquant_tvm.schedules.serial_when_small import SMALL
from tvm.script import tirx as T


@T.prim_func(private=True, s_tir=True)
def shifted(px: T.handle, py: T.handle, offset: T.int64):
    """y = x + offset through a buffer of its own, with a scalar after the output."""
    T.func_attr({"tirx.noalias": True})
    n = T.int64()
    x = T.match_buffer(px, (n, 48), "float32")
    y = T.match_buffer(py, (n, 48), "float32")
    total = T.sblock_alloc_buffer((n,), "float32")
    for i, k in T.grid(n, 48):
        with T.sblock("total"):
            row, column = T.axis.remap("SR", [i, k])
            with T.init():
                total[row] = T.float32(0)
            total[row] = total[row] + x[row, column]
    for i, k in T.grid(n, 48):
        with T.sblock("shifted"):
            row, column = T.axis.remap("SS", [i, k])
            y[row, column] = x[row, column] * total[row] + T.Cast("float32", offset)


def loops(text: str) -> tuple[str, str]:
    """The serial and the parallel version of a function's body."""
    assert text.count("    else:\n") == 1
    return tuple(text.split("    else:\n"))


def test_one_version_is_serial_and_both_give_the_same_numbers(target):
    func = schedule(shifted, target)
    serial, parallel = loops(func.script())
    assert "T.parallel(" not in serial and "T.parallel(" in parallel
    assert "T.vectorized(" in serial and "T.vectorized(" in parallel
    library = tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target)
    rng = np.random.default_rng(0)
    for rows in (1, SMALL // 48, SMALL // 48 + 1, 1000):
        x = rng.standard_normal((rows, 48)).astype("float32")
        y = tvm.runtime.tensor(np.full_like(x, np.nan))
        library["main"](tvm.runtime.tensor(x), y, 3)
        exact = x.astype("float64")
        np.testing.assert_allclose(y.numpy(), exact * exact.sum(1, keepdims=True) + 3, rtol=1e-5, atol=1e-5)
