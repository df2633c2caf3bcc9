from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.passes.pack_linear_weights import PackLinearWeights
from rotquant_tvm.passes.weight_recipes import make_weights, weight_recipes
from rotquant_tvm.schedules.linear_llvm import pack_weight
from rotquant_tvm.schedules.vector_target import VectorTarget
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.target import Target

from rotquant_tvm.errors import UsageError

LLVM = Target({"kind": "llvm", "mcpu": "x86-64-v3"})
RNG = np.random.default_rng(0)
SHAPES = [(1, 1), (1, 2), (5, 1), (1, 7), (1, 13), (3, 11)]


@I.ir_module
class Block:
    """Tied embedding, three layers over one input (one stored transposed, one with bias), residual, head."""

    @R.function
    def main(
        ids: R.Tensor(("batch", "seq"), "int32"),
        embedding: R.Tensor((70, 37), "float32"),
        gate: R.Tensor((37,), "float32"),
        w_q: R.Tensor((40, 37), "float32"),
        w_k: R.Tensor((37, 33), "float32"),
        b_k: R.Tensor((33,), "float32"),
        w_v: R.Tensor((33, 37), "float32"),
        w_o: R.Tensor((37, 40), "float32"),
        b_o: R.Tensor((37,), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            hidden = R.take(embedding, ids, axis=0, mode="fast")
            x = R.multiply(hidden, gate)
            q = R.matmul(x, R.permute_dims(w_q))
            k = R.add(R.matmul(x, w_k), b_k)
            v = R.matmul(x, R.permute_dims(w_v, axes=[1, 0]))
            o = R.add(R.matmul(q, R.permute_dims(w_o)), b_o)
            y = R.add(hidden, o)
            logits = R.matmul(y, R.permute_dims(embedding))
            R.output(logits, k, v)
        return (logits, k, v)


def weights_of(func) -> list[np.ndarray]:
    params = func.params[int(func.attrs["num_input"]) :]
    result = []
    for param in params:
        shape = tuple(int(n) for n in param.ty.shape)
        result.append((RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(str(param.ty.dtype)))
    return result


def reference(ids, embedding, gate, w_q, w_k, b_k, w_v, w_o, b_o):
    hidden = embedding[ids]
    x = hidden * gate
    y = hidden + x @ w_q.T @ w_o.T + b_o
    return y @ embedding.T, x @ w_k + b_k, x @ w_v.T


def machine(mod, target=LLVM):
    return relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())


def run(vm, *arrays, name="main"):
    result = vm[name](*[tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays])
    return [r.numpy() for r in (result if not isinstance(result, tvm.runtime.Tensor) else [result])]


def operators(mod) -> set[str]:
    found = set()

    def visit(node):
        if isinstance(node, relax.Call) and isinstance(node.op, tvm.ir.Op):
            found.add(node.op.name)

    relax.analysis.post_order_visit(mod["main"].body, visit)
    return found


@pytest.mark.parametrize("mcpu", ["x86-64", "x86-64-v3"])
@pytest.mark.parametrize("merge", [True, False])
def test_the_numbers_stay(merge, mcpu):
    target = Target({"kind": "llvm", "mcpu": mcpu})
    after = PackLinearWeights(target, merge=merge)(Block)
    relax.analysis.well_formed(after)
    assert operators(after) == {"relax.call_tir", "relax.multiply"}
    weights = weights_of(Block["main"])
    vm, packed = machine(after, target), list(make_weights(after["main"], weights))
    for shape in SHAPES:
        ids = RNG.integers(0, 70, shape).astype("int32")
        expected = reference(ids, *[w.astype("float64") for w in weights])
        for actual, exact in zip(run(vm, ids, *packed), expected, strict=True):
            np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-5)


def test_layers_of_one_input_become_one_call_and_residuals_join():
    assert PackLinearWeights(LLVM)(Block)["main"].script().count("call_tir(") == 4  # gather, q k v, o, head
    assert PackLinearWeights(LLVM, merge=False)(Block)["main"].script().count("call_tir(") == 6


def test_a_bound_sequence_length_keeps_the_numbers():
    after = PackLinearWeights(LLVM)(Block)
    decode = relax.transform.BindSymbolicVars({"seq": 1})(after)
    weights = weights_of(Block["main"])
    ids = RNG.integers(0, 70, (3, 1)).astype("int32")
    packed = list(make_weights(decode["main"], weights))
    for one, other in zip(run(machine(after), ids, *packed), run(machine(decode), ids, *packed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_recipes_tell_every_weight_of_the_new_function():
    after = PackLinearWeights(LLVM)(Block)["main"]
    recipes = weight_recipes(after)
    assert [r.name for r in recipes] == [p.name for p in after.params[1:]]
    assert [r.sources for r in recipes] == [(0,), (1,), (2, 3, 5), (4,), (6,), (7,)]
    assert [bool(r.tile) for r in recipes] == [True, False, True, False, True, False]
    assert recipes[2].transposed == (False, True, False)
    weights = weights_of(Block["main"])
    for array, param in zip(make_weights(after, weights), after.params[1:], strict=True):
        assert array.shape == tuple(int(n) for n in param.ty.shape) and array.flags.c_contiguous
    np.testing.assert_array_equal(
        recipes[0].make(weights), pack_weight(weights[0], VectorTarget.of(LLVM).tile)
    )
    assert recipes[1].make(weights) is weights[1]


def test_before_the_pass_all_weights_are_unchanged():
    assert {r.tile for r in weight_recipes(Block["main"])} == {0}
    weights = weights_of(Block["main"])
    assert all(a is b for a, b in zip(make_weights(Block["main"], weights), weights, strict=True))


def test_idempotent():
    once = PackLinearWeights(LLVM)(Block)
    tvm.ir.assert_structural_equal(PackLinearWeights(LLVM)(once), once)


@I.ir_module
class Half:
    """Weights stored as float16 and widened in the graph."""

    @R.function
    def main(
        ids: R.Tensor(("batch",), "int64"),
        embedding: R.Tensor((45, 21), "float16"),
        w: R.Tensor((19, 21), "float16"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            wide = R.astype(embedding, "float32")
            x = R.take(wide, ids, axis=0)
            y = R.matmul(x, R.permute_dims(R.astype(w, "float32")))
            logits = R.matmul(x, R.permute_dims(wide))
            R.output(y, logits)
        return (y, logits)


def test_float16_weights_stay_float16():
    after = PackLinearWeights(LLVM)(Half)
    relax.analysis.well_formed(after)
    assert operators(after) == {"relax.call_tir"}
    weights = weights_of(Half["main"])
    packed = list(make_weights(after["main"], weights))
    assert all(w.dtype == np.float16 for w in packed)
    embedding, w = (weight.astype("float64") for weight in weights)
    ids = RNG.integers(0, 45, 9)
    y, logits = run(machine(after), ids, *packed)
    np.testing.assert_allclose(y, embedding[ids] @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits, embedding[ids] @ embedding.T, rtol=1e-5, atol=1e-5)


@I.ir_module
class Untouchable:
    """Weights with other readers, inputs in place of weights, lookups that cannot read packed ones."""

    @R.function
    def main(
        x: R.Tensor(("n", 8), "float32"),
        ids: R.Tensor(("n",), "int64"),
        given: R.Tensor((8, 8), "float32"),
        scaled: R.Tensor((8, 8), "float32"),
        returned: R.Tensor((8, 8), "float32"),
        columns: R.Tensor((8, 8), "float32"),
        checked: R.Tensor((8, 8), "float32"),
        double: R.Tensor((8, 8), "float64"),
        only_looked_up: R.Tensor((8, 8), "float32"),
    ):
        R.func_attr({"num_input": 3})
        with R.dataflow():
            a = R.matmul(x, given)
            b = R.matmul(a, R.permute_dims(R.multiply(scaled, R.const(2.0, "float32"))))
            c = R.matmul(b, returned)
            d = R.matmul(c, columns)
            e = R.add(R.matmul(d, R.permute_dims(checked)), R.take(checked, ids, axis=0, mode="nan"))
            f = R.matmul(R.astype(e, "float64"), double)
            g = R.permute_dims(R.take(columns, ids, axis=1))
            h = R.take(only_looked_up, ids, axis=0)
            R.output(f, g, h)
        return (f, g, h, returned)


def test_other_readers_keep_a_weight_as_it_is():
    after = PackLinearWeights(LLVM)(Untouchable)
    tvm.ir.assert_structural_equal(after, Untouchable)
    assert {r.tile for r in weight_recipes(after["main"])} == {0}


@I.ir_module
class Shared:
    """One weight read by two linear layers, and an output of a layer that is read twice."""

    @R.function
    def main(x: R.Tensor(("n", 16), "float32"), w: R.Tensor((16, 16), "float32")):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            a = R.matmul(x, R.permute_dims(w))
            b = R.add(a, x)
            c = R.add(R.matmul(b, R.permute_dims(w)), a)
            R.output(c)
        return c


def test_a_weight_of_two_layers_is_stored_once():
    after = PackLinearWeights(LLVM)(Shared)
    relax.analysis.well_formed(after)
    assert len(after["main"].params) == 2
    (w,) = weights_of(Shared["main"])
    x = RNG.standard_normal((5, 16)).astype("float32")
    (actual,) = run(machine(after), x, *make_weights(after["main"], [w]))
    a = x.astype("float64") @ w.T
    np.testing.assert_allclose(actual, (a + x) @ w.T + a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [0, 1, -8, 24])
def test_a_bad_tile_is_refused(tile):
    with pytest.raises(UsageError, match=str(tile)):
        PackLinearWeights(LLVM, tile=tile)


def test_another_tile():
    after = PackLinearWeights(LLVM, tile=8)(Shared)
    (w,) = weights_of(Shared["main"])
    (packed,) = make_weights(after["main"], [w])
    assert packed.shape == (2, 16, 8)
    x = RNG.standard_normal((3, 16)).astype("float32")
    a = x.astype("float64") @ w.T
    np.testing.assert_allclose(run(machine(after), x, packed)[0], (a + x) @ w.T + a, rtol=1e-5, atol=1e-5)


def two_layers(bb, x, a, b, *_):
    return bb.emit(R.matmul(x, a)), bb.emit(R.matmul(x, b))


def biased(bb, x, a, b, _, p, q):
    left = bb.emit(R.add(bb.emit(R.matmul(x, a)), p))
    return R.add(left, bb.emit(R.add(bb.emit(R.matmul(x, b)), q)))


def biased_second(bb, x, a, b, _, p, q):
    left, right = two_layers(bb, x, a, b)
    return R.add(left, bb.emit(R.add(right, q)))


def chain(bb, x, a, b, c, *_):
    left, right = two_layers(bb, x, a, b)
    total = bb.emit(R.add(left, right))
    return R.add(total, bb.emit(R.matmul(x, c)))


def chain_from_the_right(bb, x, a, b, c, *_):
    third = bb.emit(R.matmul(x, c))
    return R.add(third, bb.emit(R.add(*two_layers(bb, x, a, b))))


def later_residual(bb, x, a, b, c, *_):
    first = bb.emit(R.matmul(x, a))
    hidden = bb.emit(R.tanh(bb.emit(R.matmul(x, b))))
    return R.add(first, bb.emit(R.matmul(hidden, c)))


def first_is_no_site(bb, x, a, b, *_):
    left, right = two_layers(bb, x, a, b)
    return R.add(bb.emit(R.add(left, right)), bb.emit(R.matmul(x, bb.emit(R.tanh(a)))))


# how the layers meet, what they compute, the operators left beside the packed calls
PARALLEL = {
    "two": (lambda bb, *v: R.add(*two_layers(bb, *v)), lambda x, a, b, c, p, q: x @ a + x @ b, set()),
    "reversed": (lambda bb, *v: R.add(*two_layers(bb, *v)[::-1]), lambda x, a, b, c, p, q: x @ b + x @ a, set()),
    "biased": (biased, lambda x, a, b, c, p, q: x @ a + p + x @ b + q, set()),
    "biased-second": (biased_second, lambda x, a, b, c, p, q: x @ a + x @ b + q, set()),
    "chain": (chain, lambda x, a, b, c, p, q: x @ a + x @ b + x @ c, set()),
    "chain-right": (chain_from_the_right, lambda x, a, b, c, p, q: x @ c + (x @ a + x @ b), set()),
    "later": (later_residual, lambda x, a, b, c, p, q: x @ a + np.tanh(x @ b) @ c, {"relax.tanh"}),
    "no-site": (
        first_is_no_site,
        lambda x, a, b, c, p, q: x @ a + x @ b + x @ np.tanh(a),
        {"relax.tanh", "relax.matmul", "relax.add"},
    ),
}


def parallel(build) -> tvm.IRModule:
    """``build`` over x, the square weights a, b and c, and the biases p and q."""
    shapes = {"x": (tvm.tirx.Var("n", "int64"), 16)} | dict.fromkeys("abc", (16, 16)) | dict.fromkeys("pq", (16,))
    params = [relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in shapes.items()]
    bb = relax.BlockBuilder()
    with bb.function("main", params, attrs={"num_input": 1}):
        with bb.dataflow():
            out = bb.emit_output(build(bb, *params))
        bb.emit_func_output(out)
    return bb.get()


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("case", PARALLEL)
def test_layers_that_are_added_take_the_sum_once(case, merge):
    build, reference, left = PARALLEL[case]
    mod = parallel(build)
    after = PackLinearWeights(LLVM, merge=merge)(mod)
    assert operators(after) == {"relax.call_tir"} | left
    weights = weights_of(mod["main"])
    vm, packed = machine(after), list(make_weights(after["main"], weights))
    for rows in (1, 5):
        x = RNG.standard_normal((rows, 16)).astype("float32")
        exact = reference(x.astype("float64"), *[w.astype("float64") for w in weights])
        np.testing.assert_allclose(run(vm, x, *packed)[0], exact, rtol=1e-5, atol=1e-5)


def test_a_malformed_module_is_refused():
    x, lost = (relax.Var(name, relax.TensorType((4, 4), "float32")) for name in ("x", "lost"))
    mod = tvm.IRModule({"main": relax.Function([x], R.add(x, lost), relax.TensorType((4, 4), "float32"))})
    with pytest.raises(Exception, match="lost"):
        PackLinearWeights(LLVM)(mod)
