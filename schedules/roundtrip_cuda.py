"""Round trip of plain vectors on CUDA: quantize and dequantize in one pass over memory."""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.codec_shape import CodecShape
from rotquant_tvm.ops.site_shape import OP_ATTR
from rotquant_tvm.ops.vector_code import rotation_size

from .format_core_cuda import FormatCore, compared, format_core
from .held_rotation_cuda import WEIGHT_KNOBS
from .knobs import chosen_knobs
from .vector_rows_cuda import ENCODE_KNOBS, RowLoop

Expr = Any

KNOBS: dict[str, tuple[int, ...]] = {"elements": (4, 8, 16), **WEIGHT_KNOBS, "table": (0, 1), **ENCODE_KNOBS}
"""Elements per lane and vector; the rotation; whether a table gives codes; and the loop over rows."""


LATE_ELEMENTS = 8
"""Of more float16 elements to a lane than these, the next step is read late, when this one has left its registers."""

MANY, ROWS_OF_MANY = 1 << 17, 2
"""From so many vectors on, a lane takes so many at a time, in as many blocks as there are steps of two: an H100 then
moves 2.94 TB/s instead of 2.82 (float16, d = 128, 2^20 vectors). Fewer vectors are slower so."""
EVERY = 1 << 20
"""More blocks than are asked for."""


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

    def core() -> FormatCore | None:
        return format_core(
            shape, elements, codes=False, table=by_table, weights=weights, staged=staged, exchange=exchange
        )

    first = core()
    if first is None:
        return None
    head_dim, size = shape.head_dim, rotation_size(shape.structure, shape.head_dim)
    sizes = [tir.Var(f"n{i}", "int64") for i in range(3)]
    total = sizes[0] * sizes[1] * sizes[2]
    launches = [(first, _loop(total, first, shape, target, loop_knobs))]
    by_size = _gains_by_rows(shape, first) and not loop_knobs.keys() & {"rows", "blocks"}
    if by_size and (more := core()) is not None:
        # Another expression, for each kernel to take its number of vectors in 64 bits, as one alone does: taken in 32,
        # nvcc 13.0 puts the same instructions in another order, which is 4 % slower (iso3 and iso4 in float16).
        total_of_many = sizes[2] * sizes[1] * sizes[0]
        knobs = {**loop_knobs, "rows": ROWS_OF_MANY, "blocks": EVERY}
        launches.append((more, _loop(total_of_many, more, shape, target, knobs)))
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("roundtrip")
        T.func_attr({OP_ATTR: "roundtrip", "tirx.noalias": True})
        x = T.arg("x", T.buffer((*sizes, head_dim), shape.dtype))
        rotation, inverse = (T.arg(name, T.buffer((size,), "float32")) for name in ("rotation", "inverse"))
        y = T.arg("y", T.buffer((*sizes, head_dim), shape.dtype))
        if len(launches) == 1:
            _launch(*launches[0], (x, rotation, inverse, y))
        else:
            with T.If(total < MANY):
                for each, frame in zip(launches, (T.Then, T.Else), strict=True):
                    with frame():
                        _launch(*each, (x, rotation, inverse, y))
    return builder.get()


def _gains_by_rows(shape: CodecShape, core: FormatCore) -> bool:
    """Whether vectors at a time hide latencies: where lanes neither exchange elements nor hold many of them."""
    return len(shape.structure) == 1 and core.lanes.elements <= LATE_ELEMENTS


def _loop(total: Expr, core: FormatCore, shape: CodecShape, target: Target, knobs: dict[str, int]) -> RowLoop:
    chosen = {
        "resident": core.resident if knobs.get("rows", 1) == 1 else 0,
        "late": int(shape.dtype == "float16" and core.lanes.elements > LATE_ELEMENTS),
        **knobs,
    }
    return RowLoop(total, core.lanes.groups, target, registers=core.registers, **chosen)


def _launch(core: FormatCore, loop: RowLoop, arguments: tuple[Any, Any, Any, Any]) -> None:
    x, rotation, inverse, y = arguments
    lanes, zero = core.lanes, tir.const(0, "int64")
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
