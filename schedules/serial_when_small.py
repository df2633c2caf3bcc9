"""Skip the other threads where a launch has so little to do that waking them costs more than it gains."""

from __future__ import annotations

import functools

import tvm
import tvm_ffi
from tvm import s_tir, tirx

SMALL = 16384
"""Elements of output. A launch costs 5–30 µs; a thread computes about one simple element per nanosecond."""


def serial_when_small(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Run the parallel loops of a scheduled function serially if its last output has up to SMALL elements.

    With symbolic extents this is decided at each call, so the function holds both versions of its body.
    """
    elements = functools.reduce(lambda a, b: a * b, func.params[-1].ty.shape, tirx.const(1, "int64"))
    elements = tvm.sym.Analyzer().simplify(elements)
    if isinstance(elements, tirx.IntImm):
        return func.with_body(_serial(func.body)) if int(elements) <= SMALL else func
    choice = tirx.IfThenElse(elements <= SMALL, _serial(func.body), func.body)
    root = s_tir.SBlock([], [], [], "root", choice)
    both = func.with_body(s_tir.SBlockRealize([], True, root))
    return s_tir.transform.ConvertSSA()(tvm.IRModule({"main": both}))["main"]


def _serial(body: tirx.Stmt) -> tirx.Stmt:
    def serial(loop: tirx.For) -> tirx.For:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    return tvm_ffi.structural_map(body, (tirx.For, serial))
