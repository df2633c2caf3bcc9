from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.gather_llvm import PackedGather, packed_gather
from rotquant_tvm.schedules.linear_llvm import pack_weight


@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("float16", "float32"), ("float16", "float16")], ids=str
)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 9)], ids=str)
def test_rows_of_the_embedding(shape, dtypes, run):
    stored, wanted = dtypes
    spec = PackedGather(70, 37, leading=2, index_dtype="int32", weight_dtype=stored, output_dtype=wanted)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((70, 37)).astype(stored)
    ids = rng.integers(0, 70, shape).astype("int32")
    ids.flat[0] = 69
    (y,) = run(packed_gather(spec), pack_weight(weight, 32), ids, np.zeros((*shape, 37), wanted))
    np.testing.assert_array_equal(y, weight[ids].astype(wanted))


def test_a_bad_id_reads_inside_the_weight(run):
    weight = np.arange(33 * 4, dtype="float32").reshape(33, 4)
    ids = np.array([-1, 33, 10**9], "int64")
    (y,) = run(
        packed_gather(PackedGather(33, 4, leading=1)),
        pack_weight(weight, 32),
        ids,
        np.zeros((3, 4), "float32"),
    )
    np.testing.assert_array_equal(y, weight[[0, 32, 32]])
