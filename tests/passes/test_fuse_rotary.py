from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.passes.fuse_rotary import FuseRotary
from tvm import relax
from tvm.script import relax as R

from ..schedules.cuda_targets import target_of
from .simulated_function import calls, simulate

TARGET = target_of("sm_90a")
RNG = np.random.default_rng(0)


def rotated(bb, x, cos, sin, half):
    """x · cos + rotate_half(x) · sin as transformers exports it."""
    d = int(x.ty.shape[3])
    lower = bb.emit(R.strided_slice(x, [3], [0], [half]))
    upper = bb.emit(R.strided_slice(x, [3], [half], [2**63 - 1 if half * 2 == d else d]))
    turned = bb.emit(R.concat([bb.emit(R.negative(upper)), lower], axis=-1))
    return bb.emit(R.add(bb.emit(R.multiply(x, cos)), bb.emit(R.multiply(turned, sin))))


def attention_inputs(d=32, dtype="float16", seq=None, half=None, key_first=False) -> tvm.IRModule:
    """Queries (4 heads, transposed back) and keys (2 heads) from [batch, seq, heads, d]."""
    batch = tvm.tirx.Var("batch", "int64")
    seq = tvm.tirx.Var("seq", "int64") if seq is None else seq
    sizes = {"q": (batch, seq, 4, d), "k": (batch, seq, 2, d), "cos": (batch, 1, seq, d), "sin": (batch, 1, seq, d)}
    q, k, cos, sin = params = [relax.Var(n, relax.TensorType(shape, dtype)) for n, shape in sizes.items()]
    bb = relax.BlockBuilder()
    with bb.function("main", params):
        with bb.dataflow():
            x, y = (bb.emit(R.permute_dims(v, [0, 2, 1, 3])) for v in (q, k))
            first, second = (rotated(bb, v, cos, sin, half or d // 2) for v in ((y, x) if key_first else (x, y)))
            keys, queries = (first, second) if key_first else (second, first)
            back = bb.emit(R.permute_dims(queries, [0, 2, 1, 3]))
            out = bb.emit_output(relax.Tuple([back, bb.emit(R.add(keys, keys))]))
        bb.emit_func_output(out)
    return bb.get()


def arrays(batch, seq, d):
    shapes = ((batch, seq, 4, d), (batch, seq, 2, d), (batch, 1, seq, d), (batch, 1, seq, d))
    return [RNG.standard_normal(shape).astype("float16") for shape in shapes]


@pytest.mark.parametrize("key_first", [False, True])
@pytest.mark.parametrize(("d", "seq"), [(16, 5), (80, 1), (128, 3)])
def test_queries_and_keys_become_one_kernel_and_the_numbers_stay(d, seq, key_first):
    mod = attention_inputs(d, key_first=key_first)
    after = FuseRotary(TARGET)(mod)
    assert calls(after["main"]) == ["rotary", "relax.add"]
    given = arrays(2, seq, d)
    for actual, expected in zip(simulate(after, given), simulate(mod, given), strict=True):
        np.testing.assert_allclose(actual.astype("float32"), expected.astype("float32"), rtol=4e-3, atol=4e-3)


def test_one_token():
    after = FuseRotary(TARGET)(attention_inputs(64, seq=1))
    assert calls(after["main"]) == ["rotary", "relax.add"]


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"d": 24}, {"half": 8}], ids=str)
def test_others_stay(options):
    mod = attention_inputs(**({"d": 32} | options))
    after = FuseRotary(TARGET)(mod)
    assert "rotary" not in calls(after["main"])
