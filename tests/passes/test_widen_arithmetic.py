"""WidenArithmetic: weights stay in 16 bits, everything computed is float32, and lookups widen only what they take."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tvm
from rotquant_tvm.passes.widen_arithmetic import WidenArithmetic
from tvm import relax
from tvm.relax import op

from .tiny_model import TinyModel


def module(dtype: str) -> tvm.IRModule:
    """Ids, a past and two weights: a lookup, a product, a constant, a cast and a split; then the past is joined."""
    bb, n = relax.BlockBuilder(), tvm.tirx.Var("n", "int64")
    ids = relax.Var("ids", relax.TensorType([n], "int32"))
    past = relax.Var("past", relax.TensorType([n, 6], dtype))
    table, weight = (relax.Var(name, relax.TensorType([9, 6], dtype)) for name in ("table", "weight"))
    with bb.function("main", [ids, past, table, weight], attrs={"num_input": 2}):
        with bb.dataflow():
            x = bb.emit(op.take(table, ids, axis=0, mode="clip"))
            x = bb.emit(op.multiply(x, relax.const(np.full(6, 1.5, ml_dtypes.bfloat16).astype(dtype))))
            x = bb.emit(op.astype(bb.emit(op.exp(bb.emit(op.astype(x, "float32")))), dtype))
            parts = bb.emit(op.split(x, 2, axis=1))
            x = bb.emit(op.concat([bb.emit(relax.TupleGetItem(parts, i)) for i in (1, 0)], axis=1))
            logits = bb.emit(op.astype(bb.emit(op.matmul(x, bb.emit(op.permute_dims(weight)))), "float32"))
            present = bb.emit(op.concat([past, x], axis=0))
            out = bb.emit_output(relax.Tuple([logits, present]))
        bb.emit_func_output(out)
    return bb.finalize()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_only_weights_stay_in_16_bits(dtype):
    func = WidenArithmetic()(module(dtype))["main"]
    assert [str(p.ty.dtype) for p in func.params] == ["int32", "float32", dtype, dtype]
    assert [str(field.dtype) for field in func.ret_ty.fields] == ["float32", "float32"]
    calls = [b.value for block in func.body.blocks for b in block.bindings if isinstance(b.value, relax.Call)]
    narrow = [call.op.name for call in calls if str(getattr(call.ty, "dtype", "")) == dtype]
    assert sorted(narrow) == ["relax.permute_dims", "relax.take"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_numbers_are_those_of_float32_over_the_rounded_weights(dtype):
    rng = np.random.default_rng(0)
    stored = np.dtype(getattr(ml_dtypes, dtype, dtype))
    table, weight = rng.standard_normal((2, 9, 6)).astype(stored)
    ids, past = np.array([3, 0, 8], np.int32), rng.standard_normal((3, 6)).astype(np.float32)
    executable = tvm.compile(WidenArithmetic()(module(dtype)), "llvm")
    arguments = [tvm.runtime.tensor(a) for a in (ids, past, table, weight)]
    logits, present = (x.numpy() for x in relax.VirtualMachine(executable, tvm.cpu())["main"](*arguments))
    x = np.exp(table[ids].astype(np.float64) * 1.5)
    x = np.concatenate([x[:, 3:], x[:, :3]], 1)
    np.testing.assert_allclose(logits, x @ weight.astype(np.float64).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(present, np.concatenate([past, x]), rtol=1e-6)


def test_a_model_in_float32_stays_as_it_is():
    mod = TinyModel(softcap=2.0).module()
    tvm.ir.assert_structural_equal(WidenArithmetic()(mod), mod)
