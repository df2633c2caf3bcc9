"""ViewReshapes: what only renames the axes of a tensor in memory costs no launch on CUDA.

``expand_dims``, ``squeeze`` and a ``permute_dims`` that moves axes of size 1 past others become ``reshape`` where a
kernel that nothing can be fused with reads or writes the tensor; ``reshape`` is kept an operator until the virtual
machine, which makes a view. Elsewhere they stay, for fusion to take.
"""

from __future__ import annotations

from collections import defaultdict

import tvm
from tvm import relax
from tvm.relax.expr_functor import mutator

from .function_rewriter import FunctionRewriter

VIEW = "relax.reshape"
"""The operator that is not to be made a kernel."""
_CANDIDATES = ("relax.expand_dims", "relax.squeeze", "relax.permute_dims")
_KERNELS = ("relax.call_tir", "relax.call_tir_inplace")


@tvm.transform.module_pass(opt_level=0, name="ViewReshapes")
class ViewReshapes:
    """Make reshapes of operators that move nothing, beside kernels, in every Relax function."""

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``mod``."""
        return _View(mod).transform()


@mutator
class _View(FunctionRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.read_by_kernels: set[relax.Var] = set()
        for func in mod.functions.values():
            if isinstance(func, relax.Function):
                self.read_by_kernels |= _only_read_by_kernels(func)
        self.current: relax.Var | None = None

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Remember whose value is visited."""
        self.current = binding.var
        super().visit_var_binding_(binding)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        var, call = self.current, self.visit_expr_post_order(call)
        if not _keeps_order(call) or not isinstance(call.ty.shape, relax.ShapeExpr):
            return call
        if var in self.read_by_kernels or self._from_kernel(call.args[0]):
            return relax.op.reshape(call.args[0], call.ty.shape)
        return call

    def _from_kernel(self, value: relax.Expr) -> bool:
        """Whether a kernel made a value, or it is a view of such."""
        while isinstance(value, relax.Var):
            bound = self.lookup_binding(value)
            if isinstance(bound, relax.TupleGetItem):
                value = bound.tuple_value
            elif isinstance(bound, relax.Call) and _name(bound) == VIEW:
                value = bound.args[0]
            else:
                return isinstance(bound, relax.Call) and _name(bound) in _KERNELS
        return False


def _keeps_order(call: relax.Call) -> bool:
    """Whether the elements stand in the same order afterwards."""
    if _name(call) not in _CANDIDATES or not isinstance(call.args[0].ty.shape, relax.ShapeExpr):
        return False
    if _name(call) != "relax.permute_dims":
        return True
    axes = call.attrs.axes
    if axes is None:
        return False
    sizes = call.args[0].ty.shape
    long = [axis for axis in map(int, axes) if not _is_one(sizes[axis])]
    return long == sorted(long)


def _is_one(size: tvm.tirx.Expr) -> bool:
    return isinstance(size, tvm.tirx.IntImm) and int(size) == 1


def _name(call: relax.Call) -> str:
    return str(getattr(call.op, "name", ""))


def _only_read_by_kernels(func: relax.Function) -> set[relax.Var]:
    readers: dict[relax.Var, list[bool]] = defaultdict(list)
    for block in func.body.blocks:
        for binding in block.bindings:
            value = binding.value
            kernel = isinstance(value, relax.Call) and _name(value) in _KERNELS
            relax.analysis.post_order_visit(
                value, lambda e, k=kernel: readers[e].append(k) if isinstance(e, relax.Var) else None
            )
    return {var for var, kernels in readers.items() if all(kernels)}
