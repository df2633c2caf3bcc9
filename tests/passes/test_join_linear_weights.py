from __future__ import annotations

import numpy as np
import tvm
from rotquant_tvm.passes.join_linear_weights import JoinLinearWeights
from rotquant_tvm.passes.weight_recipes import make_weights, weight_recipes
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from ..schedules.cuda_targets import target_of
from .simulated_function import calls, simulate

TARGET = target_of("sm_90a")
RNG = np.random.default_rng(0)


@I.ir_module
class Block:
    """Tied embedding, three layers over one input (one stored transposed, one with bias), residual, gated layers."""

    @R.function
    def main(
        ids: R.Tensor(("batch", "seq"), "int32"),
        embedding: R.Tensor((70, 64), "float16"),
        w_q: R.Tensor((40, 64), "float16"),
        w_k: R.Tensor((64, 24), "float16"),
        b_k: R.Tensor((24,), "float16"),
        w_v: R.Tensor((33, 64), "float16"),
        w_o: R.Tensor((64, 64), "float16"),
        w_gate: R.Tensor((48, 64), "float16"),
        w_up: R.Tensor((48, 64), "float16"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            x = R.take(embedding, ids, axis=0, mode="clip")
            q = R.matmul(x, R.permute_dims(w_q))
            k = R.add(R.matmul(x, w_k), b_k)
            v = R.matmul(x, R.permute_dims(w_v, axes=[1, 0]))
            y = R.add(x, R.matmul(x, R.permute_dims(w_o)))
            gate = R.matmul(y, R.permute_dims(w_gate))
            up = R.matmul(y, R.permute_dims(w_up))
            gated = R.multiply(R.nn.silu(gate), up)
            logits = R.matmul(y, R.permute_dims(embedding))
            R.output(logits, q, k, v, gated)
        return (logits, q, k, v, gated)


def weights_of(func) -> list[np.ndarray]:
    params = func.params[int(func.attrs["num_input"]) :]
    shapes = [tuple(int(n) for n in param.ty.shape) for param in params]
    return [(RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype("float16") for shape in shapes]


def test_the_numbers_stay():
    after = JoinLinearWeights(TARGET)(Block)
    assert set(calls(after["main"])) == {"relax.take", "linear", "linear1", "linear2", "linear3"}
    weights = weights_of(Block["main"])
    joined = list(make_weights(after["main"], weights))
    for shape in ((1, 1), (3, 1), (2, 70)):
        ids = RNG.integers(0, 70, shape).astype("int32")
        expected = simulate(Block, [ids, *weights])
        for actual, exact in zip(simulate(after, [ids, *joined]), expected, strict=True):
            np.testing.assert_allclose(actual.astype("float32"), exact.astype("float32"), rtol=4e-3, atol=4e-3)


def test_weights_of_one_input_are_one_and_others_stay_as_they_are():
    after = JoinLinearWeights(TARGET)(Block)["main"]
    recipes = weight_recipes(after)
    assert [r.name for r in recipes] == [p.name for p in after.params[1:]]
    assert [r.sources for r in recipes] == [(0,), (1, 2, 4), (3,), (5,), (6, 7)]
    assert [r.unchanged for r in recipes] == [True, False, True, True, False]
    assert recipes[1].transposed == (False, True, False)
    weights = weights_of(Block["main"])
    made = list(make_weights(after, weights))
    assert made[0] is weights[0]
    np.testing.assert_array_equal(made[1], np.concatenate([weights[1], weights[2].T, weights[4]]))
    for array, param in zip(made, after.params[1:], strict=True):
        assert array.shape == tuple(int(n) for n in param.ty.shape) and array.flags.c_contiguous


def test_idempotent():
    once = JoinLinearWeights(TARGET)(Block)
    tvm.ir.assert_structural_equal(JoinLinearWeights(TARGET)(once), once)


def layers(build, dtype="float16", features=64) -> tvm.IRModule:
    """``build(bb, x, a, b)`` over two square weights."""
    shapes = {"x": (tvm.tirx.Var("n", "int64"), features), "a": (features, features), "b": (features, features)}
    params = [relax.Var(name, relax.TensorType(shape, dtype)) for name, shape in shapes.items()]
    bb = relax.BlockBuilder()
    with bb.function("main", params, attrs={"num_input": 1}):
        with bb.dataflow():
            out = bb.emit_output(build(bb, *params))
        bb.emit_func_output(out)
    return bb.get()


def two(bb, x, a, b):
    return bb.emit(R.matmul(x, bb.emit(R.permute_dims(a)))), bb.emit(R.matmul(x, bb.emit(R.permute_dims(b))))


def second_is_gate(bb, x, a, b):
    up, gate = two(bb, x, a, b)
    return R.multiply(up, bb.emit(R.nn.silu(gate)))


def gate_is_read_twice(bb, x, a, b):
    gate, up = two(bb, x, a, b)
    return R.add(R.multiply(bb.emit(R.nn.silu(gate)), up), gate)


def test_only_what_is_nothing_but_gated_becomes_one():
    for build, kernels in ((second_is_gate, ["linear"]), (gate_is_read_twice, None)):
        mod = layers(build)
        after = JoinLinearWeights(TARGET)(mod)
        assert kernels is None or calls(after["main"]) == kernels
        weights = weights_of(mod["main"])
        x = RNG.standard_normal((5, 64)).astype("float16")
        actual = simulate(after, [x, *make_weights(after["main"], weights)])
        np.testing.assert_allclose(actual, simulate(mod, [x, *weights]), rtol=6e-3, atol=6e-3)


def test_other_types_and_sizes_stay():
    for mod in (layers(second_is_gate, "float32"), layers(second_is_gate, features=48)):
        tvm.ir.assert_structural_equal(JoinLinearWeights(TARGET)(mod), mod)


def read_both_ways(bb, x, a, b):
    y = bb.emit(R.matmul(x, bb.emit(R.permute_dims(a))))
    return bb.emit(R.matmul(bb.emit(R.matmul(y, a)), bb.emit(R.permute_dims(b))))


def test_a_weight_that_is_read_both_ways_stays():
    mod = layers(read_both_ways)
    after = JoinLinearWeights(TARGET)(mod)
    assert calls(after["main"]).count("linear") == 1
    weights = weights_of(mod["main"])
    assert all(made is weight for made, weight in zip(make_weights(after["main"], weights), weights, strict=True))
    x = RNG.standard_normal((2, 64)).astype("float16")
    np.testing.assert_allclose(simulate(after, [x, *weights]), simulate(mod, [x, *weights]), rtol=6e-3, atol=6e-3)
