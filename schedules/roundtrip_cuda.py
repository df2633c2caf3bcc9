"""Round trip of plain vectors on CUDA: quantize and dequantize in one pass over memory."""

from __future__ import annotations

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.codec_shape import CodecShape
from rotquant_tvm.ops.site_shape import OP_ATTR
from rotquant_tvm.ops.vector_code import rotation_size

from .format_core_cuda import compared, format_core
from .held_rotation_cuda import WEIGHT_KNOBS
from .knobs import chosen_knobs
from .vector_rows_cuda import ENCODE_KNOBS, RowLoop

KNOBS: dict[str, tuple[int, ...]] = {"elements": (4, 8, 16), **WEIGHT_KNOBS, "table": (0, 1), **ENCODE_KNOBS}
"""Elements per lane and vector; the rotation; whether a table gives codes; and the loop over rows."""


LATE_ELEMENTS = 8
"""Of more float16 elements to a lane than these, the next step is read late, when this one has left its registers."""


def roundtrip_cuda(func: tvm.tirx.PrimFunc, target: Target) -> tvm.tirx.PrimFunc | None:
    """The rule: a kernel for plain codebooks behind rotations of small blocks."""
    shape = CodecShape.of(func)
    return None if shape is None or not compared(shape) else build(shape, target, **chosen_knobs(func))


def build(
    shape: CodecShape,
    target: Target,
    *,
    elements: int = 8,
    weights: int | None = None,
    staged: int = 1,
    exchange: int = 1,
    table: int | None = None,
    **loop_knobs: int,
) -> tvm.tirx.PrimFunc | None:
    """Build the kernel, with the parameters of ``ops.roundtrip``; None if there is none. For knobs see ``KNOBS``."""
    by_table = None if table is None else bool(table)
    core = format_core(shape, elements, codes=False, table=by_table, weights=weights, staged=staged, exchange=exchange)
    if core is None:
        return None
    lanes, head_dim, size = core.lanes, shape.head_dim, rotation_size(shape.structure, shape.head_dim)
    loop_knobs.setdefault("resident", core.resident if loop_knobs.get("rows", 1) == 1 else 0)
    loop_knobs.setdefault("late", int(shape.dtype == "float16" and lanes.elements > LATE_ELEMENTS))
    sizes = [tir.Var(f"n{i}", "int64") for i in range(3)]
    loop = RowLoop(sizes[0] * sizes[1] * sizes[2], lanes.groups, target, registers=core.registers, **loop_knobs)
    zero = tir.const(0, "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("roundtrip")
        T.func_attr({OP_ATTR: "roundtrip", "tirx.noalias": True})
        x = T.arg("x", T.buffer((*sizes, head_dim), shape.dtype))
        rotation, inverse = (T.arg(name, T.buffer((size,), "float32")) for name in ("rotation", "inverse"))
        y = T.arg("y", T.buffer((*sizes, head_dim), shape.dtype))
        with loop.launch() as (block, thread):
            core.place(thread)
            raw = [lanes.raw() for _ in range(loop.rows)]
            loop.start(
                block,
                thread,
                core.group,
                lambda k, row: lanes.load(raw[k], x, [zero, zero, row], core.lane, loop.read),
                lambda: core.load(rotation, thread, loop.warps, inverse),
            )

            def work() -> None:
                vectors = [lanes.unpack(words) for words in raw]
                decoded = core.decode(loop.encode(core, vectors))
                loop.each_row(lambda k, row: lanes.store(list(decoded[k]), y, [zero, zero, row], core.lane, loop.write))

            loop.run(work)
    return builder.get()
