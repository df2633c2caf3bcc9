"""Layouts are emitted with as few operators as they take, and right."""

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.gather import gather_attention
from rotquant_tvm.frontend.gather.axes import AxisSpace
from rotquant_tvm.frontend.gather.emit import Emitter
from rotquant_tvm.frontend.gather.extents import ExtentTable

from .gathered_case import function_of
from .numpy_runner import run_in_numpy
from .spellings import GUARDS, LOW, B, P, S, attend, const, qkv


def emitted(shape, wanted):
    """The operators that give a tensor [shape] with atoms a, b, c, … the layout ``wanted``, and their result."""
    space, emitter = AxisSpace(ExtentTable()), Emitter(dataflow=True)
    x = relax.Var(
        "x", relax.TensorType([int(np.prod([size for size in axis], dtype=int)) for axis in shape], "float32")
    )
    axes = space.axes([int(size) for size in x.ty.shape.values])
    atoms = [
        atom
        for axis, sizes in zip(axes, shape, strict=True)
        for part in space.align(axis, list(sizes))
        for atom in part
    ]
    result = emitter.layout(
        space, x, axes, tuple(tuple(atoms["abcdef".index(name)] for name in axis) for axis in wanted)
    )
    block = relax.DataflowBlock([*emitter.bindings, relax.VarBinding(relax.Var("out", result.ty), result)])
    body = relax.SeqExpr([block], block.bindings[-1].var)
    function = relax.Function([x], body, result.ty)
    digits = np.arange(np.prod(x.ty.shape.values, dtype=int), dtype="float32")
    (array,) = run_in_numpy(function, [digits.reshape([int(size) for size in x.ty.shape.values])])
    return [binding.value.op.name.removeprefix("relax.") for binding in emitter.bindings], array


@pytest.mark.parametrize(
    ("shape", "wanted", "operators", "einsum"),
    [
        ([[2], [3], [4]], ["a", "b", "c"], [], "abc->abc"),
        ([[2], [3], [4]], ["b", "a", "c"], ["permute_dims"], "abc->bac"),
        ([[2, 3], [4]], ["a", "b", "c"], ["reshape"], "abc->abc"),
        ([[2], [3], [4]], ["ab", "c"], ["reshape"], "abc->abc"),
        ([[2], [3, 4]], ["b", "a", "c"], ["reshape", "permute_dims"], "abc->bac"),
        ([[2], [], [4]], ["", "b", "a"], ["permute_dims"], "ab->ba"),
        ([[2, 3], [4]], ["c", "ab"], ["permute_dims"], "abc->cab"),
        ([[2, 3], [4]], ["ba", "c"], ["reshape", "permute_dims", "reshape"], "abc->bac"),
    ],
)
def test_layouts(shape, wanted, operators, einsum):
    names, array = emitted(shape, wanted)
    assert names == operators
    flat = np.arange(array.size, dtype="float32").reshape([size for axis in shape for size in axis])
    np.testing.assert_array_equal(array.ravel(), np.einsum(einsum, flat).ravel())


def test_unwanted_atoms_are_taken_at_0():
    names, array = emitted([[2], [3], [4]], ["a", "", "c"])
    assert "take" in names
    np.testing.assert_array_equal(array, np.arange(24).reshape(2, 3, 4)[:, :1])


def test_a_cached_key_reaches_attention_through_one_swap():
    def body(emit, q, past, new, v):
        k = emit(R.concat([past, new], axis=2))
        wide = emit(R.reshape(emit(R.broadcast_to(emit(R.expand_dims(k, [2])), [B, 2, 2, P + S, 8])), [B, 4, P + S, 8]))
        return attend(emit, q, wide, emit(R.repeat(v, 2, 1)))

    shapes = {"q": (B, 4, S, 8), "past": (B, 2, P, 8), "new": (B, 2, S, 8), "v": (B, 2, P + S, 8)}
    function = gather_attention(function_of(shapes, body))["main"]
    values = relax.analysis.get_var2val(function)
    (call,) = (value for value in values.values() if value.op.name == "relax.nn.attention")
    swap = values[call.args[1]]
    assert [int(axis) for axis in swap.attrs.axes] == [0, 2, 1, 3]
    assert values[swap.args[0]].op.name == "relax.concat"


def test_a_mask_of_unknown_shape_is_given_the_scores():
    """A slice that may end early: TVM knows neither its size nor that of the masked scores."""

    def body(emit, q, k, v):
        buffer = const(np.tri(16, dtype=bool)[None, None], "bool")
        visible = emit(R.strided_slice(buffer, [2, 3], [0, 0], [S, P], [1, 1]))
        out = attend(emit, q, k, v, before=lambda s: emit(R.where(visible, s, const(LOW))))
        return out

    mod = function_of(qkv(), lambda e, q, k, v: R.reshape(e(body(e, q, k, v)), [B, 4, S, 8]))
    function = gather_attention(mod)["main"]
    generator = np.random.default_rng(0)
    inputs = [generator.standard_normal((2, 4, length, 8)).astype("float32") for length in (3, 5, 5)]
    (expected,), (actual,) = (run_in_numpy(one, inputs) for one in (mod["main"], function))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    (call,) = (
        c
        for c in relax.analysis.get_var2val(function).values()
        if getattr(c.op, "name", "") == "relax.nn.attention_bias"
    )
    assert [str(size) for size in call.args[3].ty.shape.values] == ["T.int64(1)", "T.int64(1)", "s", "p"]


def test_rows_need_no_guard_if_the_caller_says_so():
    mod = GUARDS["guarded"].mod
    operators = [
        [
            value.op.name
            for value in relax.analysis.get_var2val(gather_attention(mod, guard_rows=guard)["main"]).values()
        ]
        for guard in (True, False)
    ]
    assert "relax.where" in operators[0]
    assert "relax.where" not in operators[1]
