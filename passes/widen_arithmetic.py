"""WidenArithmetic: a model in 16 bits keeps its weights so and computes in float32.

CPUs have no fast arithmetic in float16 or bfloat16, but reading the weights bounds a decode step: half the bytes, and
sums and activations without roundings between operators. New keys and values reach the cache in float32, too.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

NARROW = ("float16", "bfloat16")
# What moves elements leaves weights in 16 bits, so that a lookup widens the rows that it takes and no others.
MOVES = ("relax.take", "relax.permute_dims", "relax.reshape", "relax.expand_dims", "relax.squeeze")


@tvm.transform.module_pass(opt_level=0, name="WidenArithmetic")
class WidenArithmetic:
    """Compute the function "main" of an importer in float32 over its 16-bit weights; pasts become float32.

    A model in float32 stays as it is.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``mod``."""
        names = {gvar.name_hint: gvar for gvar in mod.get_global_vars()}
        func = mod[names["main"]] if "main" in names else None
        if not isinstance(func, relax.Function) or "num_input" not in (func.attrs or {}):
            return mod
        if not any(_narrow(param.ty) for param in func.params):
            return mod
        result = tvm.IRModule(mod.functions, attrs=mod.attrs)
        result.update_func(names["main"], _Widened(func).function())
        relax.analysis.well_formed(result)
        return result


def _narrow(ty: object) -> bool:
    return isinstance(ty, relax.TensorType) and str(ty.dtype) in NARROW


def _wide(ty: relax.TensorType) -> relax.TensorType:
    return relax.TensorType(ty.shape, "float32")


class _Widened:
    """One function being copied; a variable of 16 bits is a weight, and is widened where it is computed with."""

    def __init__(self, func: relax.Function) -> None:
        self.func = func
        self.builder = relax.BlockBuilder()
        self.new: dict[relax.Var, relax.Expr] = {}
        self.widened: dict[relax.Var, relax.Var] = {}

    def function(self) -> relax.Function:
        """The widened function."""
        inputs = int(self.func.attrs["num_input"])
        params = [
            relax.Var(old.name, _wide(old.ty) if i < inputs and _narrow(old.ty) else old.ty)
            for i, old in enumerate(self.func.params)
        ]
        self.new.update(zip(self.func.params, params, strict=True))
        with self.builder.function("main", params, attrs=dict(self.func.attrs)):
            with self.builder.dataflow():
                *bindings, last = (binding for block in self.func.body.blocks for binding in block.bindings)
                for binding in bindings:
                    self.new[binding.var] = self._binding(binding)
                output = self.builder.emit_output(self._operand(last.value))
            self.builder.emit_func_output(output)
        return self.builder.finalize()["main"]

    def _binding(self, binding: relax.Binding) -> relax.Expr:
        if isinstance(binding, relax.MatchCast):
            ty = _wide(binding.ty) if _narrow(binding.ty) else binding.ty
            return self.builder.match_cast(self._operand(binding.value), ty)
        value = binding.value
        if not isinstance(value, relax.Call):
            return self._operand(value) if isinstance(value, relax.Var) else self._emit(self._operand(value), binding)
        name = getattr(value.op, "name", "")
        first = self.new.get(value.args[0]) if value.args and isinstance(value.args[0], relax.Var) else None
        if name in MOVES and first is not None and _narrow(first.ty):
            moved = [first, *(self._operand(arg) for arg in value.args[1:])]
            return self._emit(relax.Call(value.op, moved, value.attrs, value.ty_args), binding)
        if name == "relax.astype" and str(value.attrs.dtype) in (*NARROW, "float32"):
            x = self._operand(value.args[0])
            return x if str(x.ty.dtype) == "float32" else self._emit(relax.op.astype(x, "float32"), binding)
        args = [self._operand(arg) for arg in value.args]
        return self._emit(relax.Call(value.op, args, value.attrs, value.ty_args), binding)

    def _emit(self, value: relax.Expr, binding: relax.Binding) -> relax.Var:
        return self.builder.emit(value, binding.var.name)

    def _operand(self, expr: relax.Expr) -> relax.Expr:
        """What an operator computes with, in float32."""
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._operand(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self._operand(expr.tuple_value), expr.index)
        if isinstance(expr, tvm.ir.GenericConst) and _narrow(expr.ty):
            return relax.const(np.asarray(expr.value.numpy(), "float32"))
        expr = self.new.get(expr, expr) if isinstance(expr, relax.Var) else expr
        if not isinstance(expr, relax.Var) or not _narrow(expr.ty):
            return expr
        if expr not in self.widened:
            self.widened[expr] = self.builder.emit(relax.op.astype(expr, "float32"))
        return self.widened[expr]
