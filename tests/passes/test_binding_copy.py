"""BindingCopy: bindings of one function emitted into another, with variables replaced."""

from __future__ import annotations

import numpy as np
import tvm
from rotquant_tvm.passes.binding_copy import BindingCopy
from tvm import relax
from tvm.relax import op


def source() -> relax.Function:
    """f(x, y) = (x + y) * (x + y), where x + y passes a match_cast."""
    bb = relax.BlockBuilder()
    n, m = tvm.tirx.Var("n", "int64"), tvm.tirx.Var("m", "int64")
    x, y = (relax.Var(name, relax.TensorType([n], "float32")) for name in "xy")
    with bb.function("main", [x, y]):
        with bb.dataflow():
            total = bb.emit(op.add(x, y), "total")
            cast = bb.match_cast(total, relax.TensorType([m], "float32"))
            out = bb.emit_output(op.multiply(cast, cast))
        bb.emit_func_output(out)
    return bb.finalize()["main"]


def copied(replaced: bool) -> tvm.IRModule:
    """The same function built again; with ``replaced``, y stands for twice the new y."""
    func = source()
    bb = relax.BlockBuilder()
    params = [relax.Var(p.name, p.ty) for p in func.params]
    copy = BindingCopy(bb)
    for old, new in zip(func.params, params, strict=True):
        copy.replace(old, new)
    with bb.function("main", params):
        with bb.dataflow():
            if replaced:
                copy.replace(func.params[1], bb.emit(op.add(params[1], params[1])))
            for block in func.body.blocks:
                for binding in block.bindings:
                    new = copy.emit(binding)
                    assert copy.expr(binding.var).same_as(new)
            out = bb.emit_output(copy.expr(func.body.body))
        bb.emit_func_output(out)
    mod = bb.finalize()
    relax.analysis.well_formed(mod)
    return mod


def run(mod, *arrays):
    vm = relax.VirtualMachine(tvm.compile(mod, "llvm"), tvm.cpu())
    return vm["main"](*(tvm.runtime.tensor(a) for a in arrays)).numpy()


def test_a_copy_computes_the_same():
    x, y = np.float32([1, 2, 3]), np.float32([10, 20, 30])
    mod = copied(False)
    assert any(isinstance(b, relax.MatchCast) for block in mod["main"].body.blocks for b in block.bindings)
    np.testing.assert_array_equal(run(mod, x, y), (x + y) ** 2)


def test_uses_of_a_replaced_variable_follow():
    x, y = np.float32([1, 2, 3]), np.float32([10, 20, 30])
    np.testing.assert_array_equal(run(copied(True), x, y), (x + 2 * y) ** 2)


def test_names_are_kept():
    assert "total" in {var.name for var in relax.analysis.get_var2val(copied(False)["main"])}
