"""FuseRowRotation: the kernel that puts a token's key and value into the 16-bit segments rotates them itself.

A decode step with a cache policy rotates one key and one value per head and layer: two launches that take longer than
what they do. Only a chunk of one token is fused, and only what the kernel takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from rotquant_tvm.schedules.append_turned_cuda import append_turned_kernel
from tvm import relax
from tvm.relax.expr_functor import mutator

from rotquant_tvm.formats import Rotation
from rotquant_tvm.ops.append_plain import RowRotations
from rotquant_tvm.ops.rotate import RotationShape
from rotquant_tvm.ops.site_shape import SiteShape
from rotquant_tvm.ops.vector_code import Structure

from .function_rewriter import FunctionRewriter
from .kv_kernels import KernelLibrary, kernel_of, rotation_constant, site_shape


@tvm.transform.module_pass(opt_level=0, name="FuseRowRotation")
class FuseRowRotation:
    """Fuse rotate ×2 → append_plain into one call; runs after ``HoistRotation``, in the pipeline for GPUs.

    The flush before it takes the rotated rows too, but reads none of a single token where ``recent`` tokens stay in 16
    bits: the newest is not flushed. Rows that anything else reads stay rotated by launches of their own.
    """

    def __init__(self, target: tvm.target.Target) -> None:
        """Set the target, whose kernel decides which rotations it takes."""
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        return _Fuse(mod, self.target).transform()


@dataclass(frozen=True)
class _Row:
    """New keys or values as they are, and how they are rotated."""

    raw: relax.Expr
    structure: Structure
    coefficients: relax.Expr


@mutator
class _Fuse(FunctionRewriter):
    def __init__(self, mod: tvm.IRModule, target: tvm.target.Target) -> None:
        super().__init__(mod)
        self.target = target
        self.kernels = KernelLibrary(self.builder_, target)
        self.users = _users(mod)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        before, call = call, self.visit_expr_post_order(call)
        first = self._first_row(call)
        rows = self._rows(call, first) if first is not None else None
        if first is None or rows is None or not self._read_here_alone(before.args[1].fields[first : first + 2], rows):
            return call
        name, func = kernel_of(self.mod, call) or ("", None)
        operands = list(call.args[1].fields)
        operands[first : first + 2] = [row.raw for row in rows]
        if name == "flush":
            return relax.Call(call.op, [call.args[0], relax.Tuple(operands)], call.attrs, call.ty_args)
        kernel = self.kernels.append_plain(site_shape(func), _structures(rows))
        operands[first + 2 : first + 2] = [row.coefficients for row in rows]
        return relax.op.call_tir_inplace(kernel, relax.Tuple(operands), 0, call.ty_args[0])

    def _first_row(self, call: relax.Expr) -> int | None:
        """Which operand is the key of a single token, the next one its value; None where no row is left unread."""
        kernel = kernel_of(self.mod, call)
        shape = SiteShape.of(kernel[1]) if kernel is not None and kernel[0] in ("flush", "append_plain") else None
        if kernel is None or shape is None or shape.cache_policy.recent == 0:
            return None
        first = 1 if kernel[0] == "append_plain" else 3 if shape.cache_policy.center else 2
        key = call.args[1].fields[first]
        return first if isinstance(key.ty.shape[2], tvm.tirx.IntImm) and int(key.ty.shape[2]) == 1 else None

    def _read_here_alone(self, operands: list[relax.Expr], rows: tuple[_Row, _Row]) -> bool:
        """Whether nothing else reads the rotated rows; ``operands`` are those of the call as it was."""
        rotated = [operand for operand, row in zip(operands, rows, strict=True) if row.structure]
        return all(self._first_row(user) is not None for operand in rotated for user in self.users[operand])

    def _rotation(self, row: relax.Expr) -> tuple[relax.Call, RotationShape] | None:
        value = self.lookup_binding(row)
        kernel = kernel_of(self.mod, value)
        shape = RotationShape.of(kernel[1]) if kernel is not None and kernel[0] == "rotate" else None
        constant = shape is not None and isinstance(value.args[1].fields[1], tvm.ir.GenericConst)
        return (value, shape) if constant else None

    def _rows(self, call: relax.Call, first: int) -> tuple[_Row, _Row] | None:
        """The key and the value as they are, if either is rotated and the target's kernel does that."""
        k, v = (self._row(operand) for operand in call.args[1].fields[first : first + 2])
        kernel = kernel_of(self.mod, call)
        if kernel is None or not any(_structures((k, v))):
            return None
        if self.target.kind.name != "cuda":
            return k, v
        taken = append_turned_kernel(site_shape(kernel[1]), _structures((k, v)), self.target, 1)
        return None if taken is None else (k, v)

    def _row(self, operand: relax.Expr) -> _Row:
        found = self._rotation(operand)
        if found is None:
            return _Row(operand, (), rotation_constant(Rotation.draw("none", int(operand.ty.shape[3]))))
        raw, coefficients = found[0].args[1].fields
        return _Row(raw, found[1].structure, coefficients)


def _structures(rows: tuple[_Row, _Row]) -> RowRotations:
    return rows[0].structure, rows[1].structure


def _users(mod: tvm.IRModule) -> dict[relax.Var, list[relax.Expr]]:
    """By variable, the values that are computed from it, and what functions return of it."""
    users: dict[relax.Var, list[relax.Expr]] = {}
    for func in mod.functions.values():
        if isinstance(func, relax.Function):
            bindings = [binding for block in func.body.blocks for binding in block.bindings]
            for value in (*(binding.value for binding in bindings), func.body.body):
                for used in relax.analysis.all_vars(value):
                    users.setdefault(used, []).append(value)
    return users
