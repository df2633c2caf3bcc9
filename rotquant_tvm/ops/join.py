"""Join: a result waits for arrays that were updated in place and that nothing else reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from .axes import Axes


def join(result: tuple[int, str], others: Sequence[tuple[int, str]], axes: Axes) -> tvm.tirx.PrimFunc:
    """Build ``join(result, *others)``: leaves ``result`` as it is, in place.

    ``result``, ``others``: number of dimensions and dtype of each array; the others are not read. A graph orders
    calls by their data alone and drops those whose results nobody takes: this takes them.
    """

    def array(name: str, dims: int, dtype: str) -> Any:
        return T.arg(name, T.buffer([tir.Var(f"{name}_{axis}", "int64") for axis in range(dims)], dtype))

    dims, dtype = result
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("join")
        T.func_attr({"rotquant.op": "join", "tirx.noalias": True})
        kept = array("result", dims, dtype)
        for number, other in enumerate(others):
            array(f"other{number}", *other)
        with axes.blocks(1) as index, T.sblock("join"):
            first = (T.axis.spatial(1, index), *[0] * (dims - 1))
            T.reads(kept[first])
            T.writes(kept[first])
            with axes.lanes(1) as _:
                value = T.alloc_buffer((1,), dtype, scope="local")
                T.buffer_store(value, kept[first], [0])
                T.buffer_store(kept, value[0], list(first))
    return builder.get()
