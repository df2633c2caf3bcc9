"""ExpandPower keeps the numbers, negative bases included, and leaves other powers alone."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.passes.expand_power import ExpandPower
from tvm import relax


def module(exponent: float) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([4, 5], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.power(x, relax.const(exponent, "float32")))
            out = builder.emit_output(relax.op.add(y, x))
        builder.emit_func_output(out)
    return builder.get()


@pytest.mark.parametrize("exponent", [2.0, 3.0, 4.0])
def test_products_replace_small_powers(exponent):
    mod = ExpandPower()(module(exponent))
    relax.analysis.well_formed(mod)
    assert "power" not in mod["main"].script()
    x = np.random.default_rng(0).standard_normal((4, 5)).astype("float32")
    vm = relax.VirtualMachine(tvm.compile(mod, "llvm"), tvm.cpu())
    np.testing.assert_allclose(vm["main"](tvm.runtime.tensor(x)).numpy(), x**exponent + x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("exponent", [0.5, -1.0, 2.5, 5.0])
def test_other_powers_stay(exponent):
    mod = module(exponent)
    assert "power" in ExpandPower()(mod)["main"].script()
