"""Following variables to what computes them, and constants to their value."""

import math

import pytest
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.gather.contraction import _labels
from rotquant_tvm.frontend.gather.dataflow import Dataflow
from rotquant_tvm.frontend.gather.uniform import uniform

from .gathered_case import function_of
from .spellings import B, S, const


def flow_of(body, **arguments):
    return Dataflow(function_of(arguments or {"x": (B, S, 8)}, body)["main"])


def value_of(body):
    flow = flow_of(lambda emit, x: body(emit, x))
    return uniform(flow, flow.bindings[-1].value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda e, x: const(3.0), 3.0),
        (lambda e, x: const([[2.0, 2.0]]), 2.0),
        (lambda e, x: const([1.0, 2.0]), None),
        (lambda e, x: const(-math.inf), -math.inf),
        (lambda e, x: R.sqrt(e(R.astype(const(16, "int64"), "float32"))), 4.0),
        (lambda e, x: R.rsqrt(const(16.0)), 0.25),
        (lambda e, x: R.power(const(2.0), const(-3.0)), 0.125),
        (lambda e, x: R.divide(const(1.0), e(R.multiply(const(2.0), const(4.0)))), 0.125),
        (lambda e, x: R.full_like(x, const(0.5)), 0.5),
        (lambda e, x: R.zeros((B, S), "float32"), 0.0),
        (lambda e, x: R.ones_like(x), 1.0),
        (lambda e, x: R.reshape(e(R.broadcast_to(const(7.0), [2, 3])), [6]), 7.0),
        (lambda e, x: R.astype(const(0.1, "float32"), "float16"), 0.0999755859375),
        (lambda e, x: R.take(e(R.shape_to_tensor(e(R.shape_of(x)))), const(2, "int64"), axis=0), 8.0),
        (lambda e, x: R.take(e(R.shape_to_tensor(e(R.shape_of(x)))), const(1, "int64"), axis=0), None),
        (lambda e, x: R.multiply(x, const(2.0)), None),
        (lambda e, x: R.exp(x), None),
    ],
)
def test_uniform(body, expected):
    value = value_of(body)
    assert value == expected if expected is None else value == pytest.approx(expected, rel=1e-7)


def test_renamings_and_tuples_are_followed():
    def body(emit, x):
        pair = emit(relax.Tuple([emit(R.exp(x)), x]))
        return R.negative(emit(relax.TupleGetItem(pair, 0)))

    flow = flow_of(body)
    negative = flow.call(flow.bindings[-1].var, "negative")
    assert flow.operator(negative.args[0]) == "relax.exp"
    assert flow.call(negative.args[0], "sqrt") is None
    assert flow.operator(flow.function.params[0]) == "a parameter"


def test_float_casts_only():
    flow = flow_of(lambda emit, x: R.astype(emit(R.astype(x, "int32")), "float32"))
    assert flow.float_cast(flow.bindings[-1].var) is None
    flow = flow_of(lambda emit, x: R.astype(emit(R.astype(x, "float16")), "float32"))
    assert flow.uncast(flow.bindings[-1].var).same_as(flow.function.params[0])


@pytest.mark.parametrize(
    ("subscripts", "ranks", "labels"),
    [
        ("bqd,bkd->bqk", [3, 3], ["bqd", "bkd", "bqk"]),
        ("b q d, b k d -> b q k", [3, 3], ["bqd", "bkd", "bqk"]),
        ("ij,jk", [2, 2], ["ij", "jk", "ik"]),
        ("...qd,...kd->...qk", [4, 4], ["abqd", "abkd", "abqk"]),
        ("...qd,...kd->...qk", [4, 3], ["abqd", "bkd", "abqk"]),
        ("ij,jk,kl->il", [2, 2, 2], None),
        ("ij,jk->ik", [3, 2], None),
    ],
)
def test_einsum_labels(subscripts, ranks, labels):
    assert _labels(subscripts, ranks) == labels
