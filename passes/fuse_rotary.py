"""FuseRotary: the rotary embedding of a layer's queries and keys becomes one kernel on CUDA.

The form is that of transformers: x · cos + rotate_half(x) · sin over [batch, heads, seq, d], x being a transposed
[batch, seq, heads, d]. The kernel reads x before it is transposed; a result that is only transposed back is written so.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.relax.expr_functor import mutator
from tvm.target import Target
from tvm_ffi import structural_equal

from ..schedules.rotary_cuda import RotaryShape, rotary
from .function_rewriter import FunctionRewriter

SWAPPED = [0, 2, 1, 3]


@dataclass(frozen=True, eq=False)
class RotarySite:
    """One rotary embedding: ``x`` [batch, seq, heads, d]; ``back`` is the variable of the result transposed back."""

    output: relax.Var
    x: relax.Var
    cos: relax.Var
    sin: relax.Var
    back: relax.Var | None

    @property
    def result(self) -> relax.Var:
        """What takes the kernel's result."""
        return self.output if self.back is None else self.back


@tvm.transform.module_pass(opt_level=0, name="FuseRotary")
class FuseRotary:
    """Replace rotary embeddings of float16 tensors, those with the same angles together, in every Relax function."""

    def __init__(self, target: Target) -> None:
        """Set the CUDA target."""
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``mod``."""
        return _Fuse(mod, self.target).transform()


class _Bindings:
    """What variables of a function are bound to, and who reads them."""

    def __init__(self, func: relax.Function) -> None:
        self.values: dict[relax.Var, relax.Expr] = {}
        self.readers: dict[relax.Var, list[relax.Var]] = defaultdict(list)
        self.order: dict[relax.Var, int] = {}
        for block in func.body.blocks:
            for binding in block.bindings:
                self.values[binding.var] = binding.value
                self.order[binding.var] = len(self.order)
                relax.analysis.post_order_visit(
                    binding.value,
                    lambda e, var=binding.var: self.readers[e].append(var) if isinstance(e, relax.Var) else None,
                )

    def call(self, var: relax.Expr, name: str) -> relax.Call | None:
        """The call of an operator that a variable is bound to."""
        value = self.values.get(var) if isinstance(var, relax.Var) else None
        named = isinstance(value, relax.Call) and getattr(value.op, "name", "") == f"relax.{name}"
        return value if named else None

    def sites(self) -> list[list[RotarySite]]:
        """The function's rotary embeddings; those of one group have the same angles and can be computed at once."""
        groups: list[list[RotarySite]] = []
        for var in self.values:
            site = self._site(var)
            if site is None:
                continue
            group = groups[-1] if groups else None
            if group is not None and self._together(group, site):
                group.append(site)
            else:
                groups.append([site])
        return groups

    def _together(self, group: list[RotarySite], site: RotarySite) -> bool:
        """Whether nobody reads the group's results before the site's own input is there."""
        one = group[0]
        if not (one.cos.same_as(site.cos) and one.sin.same_as(site.sin)):
            return False
        there = self.order[site.output]
        return all(self.order[r] > there for other in group for r in self.readers[other.result])

    def _site(self, var: relax.Var) -> RotarySite | None:
        total = self.call(var, "add")
        for straight, turned in (total.args, total.args[::-1]) if total is not None else ():
            product, other = self.call(straight, "multiply"), self.call(turned, "multiply")
            if product is None or other is None:
                continue
            x, cos = product.args
            half, sin = other.args
            if self._half_turned(half, x) and self._angles(x, cos) and self._angles(x, sin):
                return self._untransposed(var, x, cos, sin)
        return None

    def _half_turned(self, var: relax.Expr, x: relax.Expr) -> bool:
        """Whether a variable is (−x₂, x₁)."""
        joined = self.call(var, "concat")
        if joined is None or int(joined.attrs.axis) not in (-1, 3) or len(joined.args[0].fields) != 2:
            return False
        upper, lower = joined.args[0].fields
        negative = self.call(upper, "negative")
        size = _int(x.ty.shape[3])
        if negative is None or size is None or size % 2:
            return False
        return self._slice(negative.args[0], x, size // 2, size) and self._slice(lower, x, 0, size // 2)

    def _slice(self, var: relax.Expr, x: relax.Expr, begin: int, end: int) -> bool:
        call = self.call(var, "strided_slice")
        if call is None or not call.args[0].same_as(x):
            return False
        axes, begins, ends, *strides = ([_int(value) for value in arg.fields] for arg in call.args[1:])
        if axes not in ([3], [-1]) or strides not in ([], [[1]]) or None in (*begins, *ends):
            return False
        return begins == [begin] and (ends == [end] or (ends[0] > end == _int(x.ty.shape[3])))

    def _angles(self, x: relax.Expr, angle: relax.Expr) -> bool:
        """Whether cos or sin is [batch, 1, seq, d] in float16."""
        if not isinstance(angle, relax.Var) or str(angle.ty.dtype) != "float16" or angle.ty.ndim != 4:
            return False
        shape, wanted = angle.ty.shape, x.ty.shape
        return _int(shape[1]) == 1 and all(structural_equal(shape[i], wanted[i]) for i in (0, 2, 3))

    def _untransposed(self, var: relax.Var, x: relax.Var, cos: relax.Var, sin: relax.Var) -> RotarySite | None:
        source = self.call(x, "permute_dims")
        if source is None or not _swaps(source) or str(x.ty.dtype) != "float16":
            return None
        readers = self.readers[var]
        back = self.call(readers[0], "permute_dims") if len(readers) == 1 else None
        return RotarySite(var, source.args[0], cos, sin, readers[0] if back is not None and _swaps(back) else None)


def _int(value: object) -> int | None:
    value = getattr(value, "value", value)
    return int(value) if isinstance(value, int | tvm.tirx.IntImm) else None


def _swaps(call: relax.Call) -> bool:
    return call.attrs.axes is not None and [int(axis) for axis in call.attrs.axes] == SWAPPED


@mutator
class _Fuse(FunctionRewriter):
    def __init__(self, mod: tvm.IRModule, target: Target) -> None:
        super().__init__(mod)
        self.target = target
        self.last: dict[relax.Var, list[RotarySite]] = {}
        self.results: dict[relax.Var, relax.Expr] = {}
        for func in mod.functions.values():
            if isinstance(func, relax.Function):
                for group in _Bindings(func).sites():
                    if _shape(group).fits:
                        self.last[group[-1].output] = group

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Emit a group where the last of its embeddings stands."""
        group = self.last.get(binding.var)
        if group is not None:
            self._call(group)
        if binding.var in self.results:
            self.set_var_remap(binding.var, self.results[binding.var])
        else:
            super().visit_var_binding_(binding)

    def _call(self, group: list[RotarySite]) -> None:
        gvar = self.builder_.add_func(rotary(_shape(group), self.target), "rotary")
        one = group[0]
        operands = [self.visit_expr(x) for x in (*(site.x for site in group), one.cos, one.sin)]
        types = [site.result.ty for site in group]
        call = self.builder_.emit(relax.call_tir(gvar, operands, types if len(types) > 1 else types[0]))
        for i, site in enumerate(group):
            value = self.builder_.emit(relax.TupleGetItem(call, i)) if len(group) > 1 else call
            self.results[site.result] = value
            self.set_var_remap(site.result, value)  # it may have been emitted; its readers are yet to come


def _shape(group: list[RotarySite]) -> RotaryShape:
    heads = tuple(int(site.x.ty.shape[2]) for site in group)
    return RotaryShape(heads, tuple(site.back is None for site in group), int(group[0].x.ty.shape[3]))
