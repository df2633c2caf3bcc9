"""Skip the other threads where a launch has so little to do that waking them costs more than it gains."""

from __future__ import annotations

import functools

import tvm
import tvm_ffi
from tvm import s_tir, tirx

SMALL = 16384
"""Elements of output. A launch costs 5–30 µs; a thread computes about one simple element per nanosecond."""


def serial_when_small(func: tirx.PrimFunc, small: int = SMALL) -> tirx.PrimFunc:
    """Run the parallel loops of a scheduled function serially if its last output has up to ``small`` elements.

    With symbolic extents this is decided at each call, so the function holds both versions of its body.
    """
    output = [param for param in func.params if _shape(param)][-1:]  # scalars may follow it
    extents = _shape(output[0]) if output else []
    elements = functools.reduce(lambda a, b: a * b, extents, tirx.const(1, "int64"))
    elements = tvm.sym.Analyzer().simplify(elements)
    if isinstance(elements, tirx.IntImm):
        return func.with_body(_serial(func.body)) if int(elements) <= small else func
    choice = tirx.IfThenElse(elements <= small, _serial(_copy(func)), func.body)
    root = s_tir.SBlock([], [], [], "root", choice)
    return func.with_body(s_tir.SBlockRealize([], True, root))


def _copy(func: tirx.PrimFunc) -> tirx.Stmt:
    """Return the body with variables and buffers of its own, but over the same parameters."""
    other = s_tir.renew_defs(func)
    same: dict[tvm.ir.Var, tvm.ir.Expr] = {}
    for new, old in zip(other.params, func.params, strict=True):
        same[new] = old
        extents = zip(_shape(new), _shape(old), strict=True)
        same.update((n, o) for n, o in extents if isinstance(n, tvm.ir.Var))
    return tvm_ffi.structural_map(other.body, (tvm.ir.Var, lambda var: same.get(var, var)))


def _shape(param: tvm.ir.Var) -> list[tvm.ir.Expr]:
    return list(getattr(param.ty, "shape", ()))  # a scalar parameter has none


def _serial(body: tirx.Stmt) -> tirx.Stmt:
    def serial(loop: tirx.For) -> tirx.For:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    return tvm_ffi.structural_map(body, (tirx.For, serial))
