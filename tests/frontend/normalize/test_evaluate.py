"""NumPy's operators against TVM's own: one compiled function holds them all."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.normalize.array_operators import ARRAY_OPERATORS
from rotquant_tvm.frontend.normalize.evaluate import Evaluation
from rotquant_tvm.frontend.normalize.operator_table import Unevaluable
from rotquant_tvm.frontend.normalize.scalar_operators import SCALAR_OPERATORS
from rotquant_tvm.frontend.normalize.step_view import StepView

ROWS, COLUMNS = 3, 4
UNTESTED = {
    # Without a meaning for numbers, made of shapes that only exist while TVM runs, or NumPy's by name and by nature.
    "wrap_param", "tensor_to_shape", "dynamic_strided_slice", "index_tensor", "size", "meshgrid", "nn.pad",
    "bitwise_not", "isfinite", "index_put", "ewise_fma", "outer", "flatten", "eye", "one_hot", "cumprod", "prod",
    "trunc", "scatter_nd", "power",
}  # fmt: skip


def _results(emit, f, i, b, n):
    """Values of every operator, of float f, integer i, boolean b, all [n, COLUMNS], n symbolic."""
    one = relax.const(1, "int64")
    index = relax.const(np.array([[2, 0], [1, 1], [0, 3]]), "int64")
    yield from (emit(getattr(R, name)(f)) for name in UNARY_FLOAT)
    yield from (emit(getattr(R, name)(emit(R.abs(f)))) for name in ("sqrt", "log", "rsqrt"))
    yield emit(R.nn.relu(f))
    yield from (emit(getattr(R, name)(f, emit(R.add(f, f)))) for name in BINARY_FLOAT)
    yield from (emit(getattr(R, name)(i, emit(R.add(R.abs(i), one)))) for name in BINARY_INTEGER)
    yield from (emit(getattr(R, f"logical_{name}")(b, emit(R.logical_not(b)))) for name in ("and", "or", "xor"))
    yield emit(R.clip(f, -0.5, 0.5))
    yield emit(R.where(b, f, relax.const(0.0, "float32")))
    yield emit(R.astype(f, "int32"))
    yield emit(R.arange(n, 3 * n, 2, "int64"))
    yield emit(R.full(relax.ShapeExpr([n, 2]), relax.const(3, "int64"), "int64"))
    yield from (emit(getattr(R, name)(relax.ShapeExpr([n, 2]), "float32")) for name in ("ones", "zeros"))
    yield from (emit(getattr(R, name)(f)) for name in ("ones_like", "zeros_like"))
    yield emit(R.full_like(i, one))
    yield emit(R.shape_to_tensor(emit(R.shape_of(f))))
    yield emit(R.broadcast_to(emit(R.expand_dims(f, 1)), [n, 2, COLUMNS]))
    yield emit(R.concat([f, f], axis=1))
    yield emit(R.stack([f, f], axis=1))
    yield emit(R.flip(f, 1))
    yield emit(R.permute_dims(f, [1, 0]))
    yield emit(R.repeat(f, 2, 1))
    yield emit(R.tile(f, [2, 1]))
    yield emit(R.reshape(f, [COLUMNS, n]))
    yield emit(R.squeeze(emit(R.expand_dims(f, 0)), 0))
    halves = emit(R.split(f, 2, axis=1))
    yield from (emit(relax.TupleGetItem(halves, part)) for part in (0, 1))
    yield emit(R.strided_slice(f, axes=[0, 1], begin=[1, -1], end=[n, -4], strides=[1, -1]))
    yield emit(R.take(f, index, axis=1, mode="clip"))
    yield emit(R.take(f, relax.const(-1, "int64"), axis=1, mode="wrap"))
    yield emit(R.gather_elements(f, index, axis=1))
    yield emit(R.gather_nd(f, emit(R.expand_dims(relax.const(np.array([2, 0, 1]), "int64"), 1)), batch_dims=1))
    first = emit(R.strided_slice(f, [1], [0], [1]))
    yield emit(R.scatter_elements(f, relax.const(np.array([[1], [0], [3]]), "int64"), first, axis=1))
    yield from (emit(getattr(R, name)(f, k)) for name in ("tril", "triu") for k in (-1, 0, 1))
    yield from (emit(R.cumsum(i, axis=1, dtype="int64", exclusive=exclusive)) for exclusive in (False, True))
    for name in ("max", "min", "mean", "sum"):
        yield from (emit(getattr(R, name)(f, axis=1, keepdims=keep)) for keep in (False, True))
    yield from (emit(getattr(R, name)(f, axis=1)) for name in ("argmax", "argmin"))
    yield emit(R.matmul(f, emit(R.permute_dims(f, [1, 0]))))


UNARY_FLOAT = ["abs", "ceil", "cos", "exp", "floor", "isinf", "isnan", "negative", "round", "sigmoid", "sign", "sin",
               "square", "tanh"]  # fmt: skip
BINARY_FLOAT = ["add", "divide", "equal", "greater", "greater_equal", "less", "less_equal", "maximum", "minimum",
                "multiply", "not_equal", "subtract"]  # fmt: skip
BINARY_INTEGER = ["bitwise_and", "bitwise_or", "bitwise_xor", "floor_divide", "floor_mod", "mod", "divide",
                  "left_shift", "right_shift"]  # fmt: skip


@pytest.mark.full
def test_operators_are_those_of_tvm():
    n = tvm.tirx.Var("n", "int64")
    params = [relax.Var(name, relax.TensorType([n, COLUMNS], dtype)) for name, dtype in
              (("f", "float32"), ("i", "int64"), ("b", "bool"))]  # fmt: skip
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            result = builder.emit_output(relax.Tuple(list(_results(builder.emit, *params, n))))
        builder.emit_func_output(result)
    mod = builder.get()
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((ROWS, COLUMNS)).astype("float32"), rng.integers(-3, 4, (ROWS, COLUMNS)),
              rng.random((ROWS, COLUMNS)) < 0.5]  # fmt: skip
    machine = relax.VirtualMachine(tvm.compile(relax.get_pipeline("zero")(mod), "llvm"), tvm.cpu())
    wanted = machine["main"](*(tvm.runtime.tensor(value) for value in values))
    view = StepView(mod["main"])
    evaluation = Evaluation(view, dict(zip(mod["main"].params, values, strict=True)), {n: ROWS})
    for output, theirs in zip(view.outputs, wanted, strict=True):
        ours = evaluation.value(output)
        what = str(view.values[output])
        assert ours.dtype == theirs.numpy().dtype and ours.shape == theirs.numpy().shape, what
        np.testing.assert_allclose(ours, theirs.numpy(), 1e-5, 1e-6, err_msg=what)
    used = {view.op(var) for var in view.values} - {""}
    assert set(SCALAR_OPERATORS) | set(ARRAY_OPERATORS) == used | UNTESTED


def _evaluation(make):
    n = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType([n, 2], "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(make(builder.emit, x, n))
        builder.emit_func_output(result)
    view = StepView(builder.get()["main"])
    evaluation = Evaluation(view, {view.function.params[0]: np.ones((3, 2), "float32")}, {n: 3})
    return lambda: evaluation.value(view.outputs[0])


def test_what_cannot_be_evaluated_is_named():
    with pytest.raises(Unevaluable, match=r"relax\.erf"):
        _evaluation(lambda emit, x, n: R.erf(x))()
    with pytest.raises(Unevaluable, match=r"relax\.take at these sizes"):
        _evaluation(lambda emit, x, n: R.take(x, relax.const(7, "int64"), axis=0))()
