"""Functions over empty tensors, which the rules leave as they are."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules.elementwise_llvm import Elementwise
from rotquant_tvm.schedules.row_reduction_llvm import RowReduction
from rotquant_tvm.schedules.schedule_for_llvm import schedule
from tvm import te, tirx, topi
from tvm.target import Target

LLVM = Target({"kind": "llvm", "mcpu": "x86-64-v3"})
N = tirx.Var("n", "int64")
RNG = np.random.default_rng(0)


def middle_is_empty(x):
    """An empty tensor between input and output only: what full rotation leaves of a head."""
    rest = topi.multiply(topi.strided_slice(x, [16], [16], [1], axes=[1]), tirx.const(2.0, "float32"))
    return topi.concatenate([topi.add(x, x), rest], axis=1)


# Shapes of the inputs for some n, what is computed. No sum over an empty axis: TVM itself leaves its output unwritten.
CASES = {
    "output": ([(N, 0)], lambda x: topi.add(x, x), lambda x: x + x),
    "input": ([(N, 16), (N, 0)], lambda x, y: topi.concatenate([x, y], axis=1), lambda x, y: x),
    "middle": ([(N, 16)], middle_is_empty, lambda x: x + x),
    "reduction": ([(0, 16)], lambda x: topi.sum(x, axis=1), lambda x: x.sum(1)),
    "static": ([(3, 0)], lambda x: topi.exp(x), np.exp),
}


def function(case) -> tirx.PrimFunc:
    shapes, build, _ = CASES[case]
    inputs = [te.placeholder(shape, "float32", name=f"x{i}") for i, shape in enumerate(shapes)]
    return te.create_prim_func([*inputs, build(*inputs)])


@pytest.mark.parametrize("case", CASES)
def test_rules_decline(case):
    assert all(rule.apply(function(case), LLVM) is None for rule in (Elementwise(), RowReduction()))


@pytest.mark.parametrize("case", CASES)
def test_the_function_works_as_it_is(case):
    shapes, _, reference = CASES[case]
    scheduled = schedule(function(case), LLVM)
    assert "T.parallel" not in scheduled.script()
    arrays = [RNG.standard_normal([3 if n is N else n for n in shape]).astype("float32") for shape in shapes]
    expected = reference(*arrays)
    out = tvm.runtime.tensor(np.empty(expected.shape, "float32"))
    tvm.compile(scheduled, LLVM)(*map(tvm.runtime.tensor, arrays), out)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-6)


def test_symbolic_extents_are_scheduled():
    x = te.placeholder((N, 16), "float32", name="x")
    assert Elementwise().apply(te.create_prim_func([x, topi.add(x, x)]), LLVM) is not None
    assert RowReduction().apply(te.create_prim_func([x, topi.sum(x, axis=1)]), LLVM) is not None
