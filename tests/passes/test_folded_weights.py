"""Weights that take rotations over: records survive a function's attribute, blocks are rotated, the rest stays."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.passes.folded_weights import (
    FOLDS_ATTR,
    FoldedWeights,
    WeightRotation,
    weight_rotations,
    with_weight_rotations,
)
from tvm import relax

from rotquant_tvm.formats import Rotation

KEY, VALUE = Rotation.draw("hurwitz", 32, 1), Rotation.draw("dense", 32, 2)
RECORDS = [
    WeightRotation.by(KEY, 0, 0, (0, 64)),
    WeightRotation.by(VALUE, 0, 0, (32,)),
    WeightRotation.by(VALUE, 1, 1, (5,)),
    WeightRotation.by(KEY, 2, 0, (0,)),
]


def function() -> relax.Function:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([1], "float32"))
    with bb.function("main", [x]):
        bb.emit_func_output(x)
    return bb.finalize()["main"]


def test_records_are_read_back_as_they_were_written():
    func = with_weight_rotations(function(), RECORDS)
    assert weight_rotations(func) == RECORDS
    np.testing.assert_array_equal(weight_rotations(func)[1].rotation.matrix(), RECORDS[1].rotation.matrix())
    assert weight_rotations(function()) == []
    assert FOLDS_ATTR in func.attrs and FOLDS_ATTR not in with_weight_rotations(function(), []).attrs


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_blocks_are_rotated_and_the_rest_stays(dtype):
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype(dtype) for shape in [(96, 7), (3, 40), (32,), (4, 4)]]
    before = [weight.copy() for weight in weights]
    made = FoldedWeights(weights, RECORDS)
    assert len(made) == 4 and made[3] is weights[3] and made[-1] is weights[3]
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype == "float32" else 4e-3}
    blocks = before[0].astype(np.float64).reshape(3, 32, 7)
    wanted = [r.matrix() @ block for r, block in zip((KEY, VALUE, KEY), blocks, strict=True)]
    np.testing.assert_allclose(made[0].astype(np.float64), np.concatenate(wanted), **tolerance)
    assert made[0].dtype == dtype
    np.testing.assert_allclose(made[1][:, 5:37], VALUE.apply(before[1][:, 5:37].astype(np.float64)), **tolerance)
    np.testing.assert_array_equal(made[1][:, [*range(5), 37, 38, 39]], before[1][:, [*range(5), 37, 38, 39]])
    np.testing.assert_allclose(made[2], KEY.apply(before[2].astype(np.float64)), **tolerance)
    assert all(np.array_equal(a, b) for a, b in zip(weights, before, strict=True))
    assert [x is y for x, y in zip(made[2:], [made[2], weights[3]], strict=True)] == [False, True]


def test_positions_tell_records_of_one_weight_apart():
    first, second, third, _ = (record.positions for record in RECORDS)
    assert len(first) == 64 and len(second) == 32
    assert not first & second and not second & third
    assert RECORDS[0].positions & WeightRotation.by(VALUE, 0, 0, (90,)).positions
