"""FeatureProbe: what is evaluated is what the operators compute; the rest are leaves."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.passes.feature_probe import FeatureProbe, operator_name
from tvm import relax
from tvm.relax import op


def probe_of(build):
    """A probe of x [batch, seq, 6], y [6] ↦ build(builder, x, y), and (x, y, result)."""
    import tvm

    batch, seq = tvm.tirx.Var("batch", "int64"), tvm.tirx.Var("seq", "int64")
    x = relax.Var("x", relax.TensorType([batch, seq, 6], "float32"))
    y = relax.Var("y", relax.TensorType([6], "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, y]):
        with bb.dataflow():
            made = build(bb, x, y)
            out = bb.emit_output(made)
        bb.emit_func_output(out)
    return FeatureProbe(bb.finalize()["main"]), x, y, made


X = np.random.default_rng(0).standard_normal((1, 2, 6))
Y = np.random.default_rng(1).standard_normal(6)


def shaped(x, *rest):
    return [*x.ty.shape.values[:2], *rest]


CASES = {
    "add": (lambda bb, x, y: bb.emit(op.add(x, y)), lambda x, y: x + y),
    "subtract": (lambda bb, x, y: bb.emit(op.subtract(x, y)), lambda x, y: x - y),
    "angles": (
        lambda bb, x, y: bb.emit(op.multiply(bb.emit(op.cos(x)), bb.emit(op.negative(bb.emit(op.sin(y)))))),
        lambda x, y: np.cos(x) * -np.sin(y),
    ),
    "constant": (lambda bb, x, y: bb.emit(op.multiply(x, relax.const(3.0, "float32"))), lambda x, y: 3 * x),
    "heads": (
        lambda bb, x, y: bb.emit(op.permute_dims(bb.emit(op.reshape(x, shaped(x, 3, 2))), [0, 2, 1, 3])),
        lambda x, y: x.reshape(1, 2, 3, 2).transpose(0, 2, 1, 3),
    ),
    "every other": (
        lambda bb, x, y: bb.emit(op.strided_slice(x, [-1], [1], [2**63 - 1], [2])),
        lambda x, y: x[..., 1::2],
    ),
    "split": (
        lambda bb, x, y: bb.emit(relax.TupleGetItem(bb.emit(op.split(x, [1, 4], axis=-1)), 1)),
        lambda x, y: x[..., 1:4],
    ),
    "halves": (
        lambda bb, x, y: bb.emit(relax.TupleGetItem(bb.emit(op.split(x, 2, axis=2)), 1)),
        lambda x, y: x[..., 3:],
    ),
    "concat": (lambda bb, x, y: bb.emit(op.concat([x, x], axis=-1)), lambda x, y: np.concatenate([x, x], -1)),
    "axes": (
        lambda bb, x, y: bb.emit(op.squeeze(bb.emit(op.expand_dims(x, [0, 4])), [0])),
        lambda x, y: x[..., None],
    ),
    "broadcast": (lambda bb, x, y: bb.emit(op.broadcast_to(y, [4, 6])), lambda x, y: np.broadcast_to(y, (4, 6))),
    "take": (
        lambda bb, x, y: bb.emit(op.take(x, relax.const(np.array([4, 0], "int64")), axis=2)),
        lambda x, y: x[..., [4, 0]],
    ),
    "cast": (lambda bb, x, y: bb.emit(op.astype(x, "float16")), lambda x, y: x),
}


@pytest.mark.parametrize("case", CASES)
def test_operators(case):
    build, wanted = CASES[case]
    probe, x, y, made = probe_of(build)
    np.testing.assert_allclose(probe.evaluate(made, {x: X, y: Y}), wanted(X, Y), rtol=1e-6)


def test_leaves_are_fixed_and_of_the_sizes_of_a_probe():
    probe, x, y, made = probe_of(lambda bb, x, y: bb.emit(op.add(bb.emit(op.exp(x)), y)))
    inside, leaves = probe.region(made)
    assert inside == {made} and [probe.operator(leaf) for leaf in leaves if not leaf.same_as(y)] == ["exp"]
    first = probe.evaluate(made, {})
    assert first.shape == probe.shape(x) == (1, 2, 6)
    np.testing.assert_array_equal(first, probe.evaluate(made, {}))
    np.testing.assert_allclose(probe.evaluate(made, {y: np.zeros(6)}) + probe.evaluate(y, {}), first)


@pytest.mark.parametrize(
    ("build", "moves"),
    [
        (lambda bb, x, y: bb.emit(op.reshape(x, shaped(x, 3, 2))), True),
        (lambda bb, x, y: bb.emit(op.take(x, relax.const(np.array([4, 0], "int64")), axis=2)), True),
        (lambda bb, x, y: bb.emit(op.take(x, relax.const(np.array([4, 4], "int64")), axis=2)), False),
        (lambda bb, x, y: bb.emit(op.take(x, relax.const(np.array([-1], "int64")), axis=2)), False),
        (lambda bb, x, y: bb.emit(op.concat([x, x], axis=-1)), False),
        (lambda bb, x, y: bb.emit(op.negative(x)), False),
        (lambda bb, x, y: bb.emit(op.exp(x)), False),
    ],
)
def test_what_only_moves_elements(build, moves):
    probe, _, _, made = probe_of(build)
    assert probe.only_moves(made) == moves


def test_what_depends_on_what():
    probe, x, _, made = probe_of(lambda bb, x, y: bb.emit(op.add(bb.emit(op.exp(x)), bb.emit(op.negative(y)))))
    total = probe.value(made)
    straight, negative = total.args
    assert straight in probe.ids_dependent and negative not in probe.ids_dependent
    assert negative in probe.positions_dependent and straight not in probe.positions_dependent
    assert probe.reaches(x, made) and not probe.reaches(made, x) and not probe.reaches(x, negative)
    assert probe.after(straight, {made}) == {straight, made}
    assert operator_name(total) == "add" and operator_name(None) == "" and probe.operator(x) == ""
