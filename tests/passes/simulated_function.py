"""Runs a Relax function in NumPy; calls of TIRx kernels run on the simulated GPU."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax, tirx
from tvm_ffi import structural_map

from ..schedules.simulated_tensor_cores import TensorCoreGPU


def simulate(mod, arrays, name="main"):
    """What ``mod[name]`` returns for NumPy arrays: an array, or a list for a tuple."""
    return _Run(mod).run(mod[name], arrays)


class _Run:
    def __init__(self, mod) -> None:
        self.mod, self.values, self.sizes = mod, {}, {}

    def run(self, func, arrays):
        for param, array in zip(func.params, arrays, strict=True):
            for size, actual in zip(param.ty.shape, array.shape, strict=True):
                if isinstance(size, tirx.Var):
                    assert self.sizes.setdefault(size, actual) == actual
                else:
                    assert int(size) == actual
            self.values[param] = array
        for block in func.body.blocks:
            for binding in block.bindings:
                self.values[binding.var] = self.value(binding.value)
        return self.value(func.body.body)

    def value(self, expr):
        if isinstance(expr, relax.Var):
            return self.values[expr]
        if isinstance(expr, relax.Tuple):
            return [self.value(field) for field in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            return self.value(expr.tuple_value)[int(expr.index)]
        if isinstance(expr, relax.ShapeExpr):
            return tuple(self.size(size) for size in expr.values)
        if hasattr(expr, "value") and hasattr(expr.value, "numpy"):
            return expr.value.numpy()
        return getattr(self, expr.op.name.replace(".", "_"))(expr, *expr.args)

    def size(self, size) -> int:
        if isinstance(size, tirx.Var):
            return self.sizes[size]
        known = structural_map(size, (tirx.Var, lambda var: tirx.const(self.sizes[var], "int64")))
        return int(tvm.sym.Analyzer().simplify(known))

    def relax_call_tir(self, expr, gvar, operands):
        types = list(expr.ty.fields) if hasattr(expr.ty, "fields") else [expr.ty]
        results = [np.zeros([self.size(n) for n in t.shape], str(t.dtype)) for t in types]
        for result in results:
            result.view(np.uint8).fill(0xFF)
        arguments = [np.ascontiguousarray(self.value(x)) for x in operands]
        TensorCoreGPU(self.mod[gvar])(*arguments, *results)
        return results if hasattr(expr.ty, "fields") else results[0]

    def relax_permute_dims(self, expr, x):
        axes = expr.attrs.axes
        return np.transpose(self.value(x), None if axes is None else [int(axis) for axis in axes])

    def relax_reshape(self, expr, x, shape):
        return np.reshape(self.value(x), self.value(shape))

    relax_expand_dims = relax_squeeze = lambda self, expr, x: np.reshape(
        self.value(x), [self.size(n) for n in expr.ty.shape]
    )

    def relax_take(self, expr, x, ids):
        return np.take(self.value(x), self.value(ids), axis=int(expr.attrs.axis))

    def relax_matmul(self, expr, a, b):
        return (self.value(a).astype("float32") @ self.value(b).astype("float32")).astype(str(expr.ty.dtype))

    def relax_astype(self, expr, x):
        return self.value(x).astype(str(expr.ty.dtype))

    def relax_concat(self, expr, parts):
        return np.concatenate(self.value(parts), axis=int(expr.attrs.axis))

    def relax_strided_slice(self, expr, x, axes, begin, end, *_):
        index = [slice(None)] * self.value(x).ndim
        for axis, first, last in zip(axes.fields, begin.fields, end.fields, strict=True):
            index[int(axis.value)] = slice(int(first.value), int(last.value))
        return self.value(x)[tuple(index)]

    def relax_mean(self, expr, x):
        return self.value(x).mean(axis=tuple(int(a) for a in expr.attrs.axis), keepdims=bool(expr.attrs.keepdims))

    def relax_nn_silu(self, expr, x):
        value = self.value(x).astype("float32")
        return (value / (1 + np.exp(-value))).astype(str(expr.ty.dtype))


def _elementwise(function):
    def apply(self, expr, *operands):
        return function(*(self.value(x) for x in operands)).astype(str(expr.ty.dtype))

    return apply


for _name, _function in {
    "add": np.add,
    "multiply": np.multiply,
    "negative": np.negative,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
}.items():
    setattr(_Run, f"relax_{_name}", _elementwise(_function))


def calls(func, name="relax.call_tir") -> list[str]:
    """Names of the kernels that a function calls, or of its other operators, in order."""
    found = []
    for block in func.body.blocks:
        for binding in block.bindings:
            if isinstance(binding.value, relax.Call):
                op = binding.value.op.name
                found.append(binding.value.args[0].name_hint if op == name else op)
    return found
