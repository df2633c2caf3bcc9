"""Join: a result waits for arrays that were updated in place and that nothing else reads."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from .axes import Axes


def join(columns: int, dtype: str, others: Sequence[tuple[int, str]], axes: Axes) -> tvm.tirx.PrimFunc:
    """Build ``join(result, *others)``: leaves ``result`` ``dtype`` [batch, columns] as it is, in place.

    ``others``: number of dimensions and dtype of each array; none is read. A graph orders calls by their data alone and
    drops those whose results nobody takes: this takes them.
    """
    batch = tir.Var("batch", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("join")
        T.func_attr({"rotquant.op": "join", "tirx.noalias": True})
        result = T.arg("result", T.buffer((batch, columns), dtype))
        for number, (dims, other) in enumerate(others):
            sizes = [tir.Var(f"n{number}_{axis}", "int64") for axis in range(dims)]
            T.arg(f"other_{number}", T.buffer(sizes, other))
        with axes.blocks(1) as index, T.sblock("join"):
            block = T.axis.spatial(1, index)
            T.reads(result[block, 0])
            T.writes(result[block, 0])
            with axes.lanes(1) as _:
                value = T.alloc_buffer((1,), dtype, scope="local")
                T.buffer_store(value, result[block, 0], [0])
                T.buffer_store(result, value[0], [block, 0])
    return builder.get()
