"""The vector rotate kernel against NumPy for every family that it takes, and its inverse."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules.rotate_llvm import ROWS, rotate_llvm

from rotquant_tvm.formats import Rotation
from rotquant_tvm.ops.rotate import RotationShape
from rotquant_tvm.target import host_target

FAMILIES = [
    ("planar", 64),
    ("iso", 80),
    ("iso-full", 128),
    ("rotor", 80),
    ("rotor", 128),
    ("turbo", 64),
    ("turbo", 128),
    ("hurwitz", 80),
    ("hurwitz", 96),
    ("hurwitz", 256),
]


@pytest.mark.parametrize(
    ("family", "head_dim", "dtype"), [(*case, "float32") for case in FAMILIES] + [("hurwitz", 80, "float16")]
)
def test_rotates_as_numpy_does(family, head_dim, dtype):
    drawn = Rotation.draw(family, head_dim, 3)
    rng = np.random.default_rng(0)
    for rotation in (drawn, drawn.inverse()):
        kernel = rotate_llvm(RotationShape(rotation.structure, head_dim, dtype), host_target())
        run = tvm.compile(tvm.IRModule({"rotate": kernel}), host_target())["rotate"]
        for shape in ((1, 1, 1), (1, 7, 3), (2, ROWS, 5), (1, ROWS + 1, 1)):
            x = rng.standard_normal((*shape, head_dim)).astype(dtype)
            y = tvm.runtime.tensor(np.full_like(x, np.nan))
            run(tvm.runtime.tensor(x), tvm.runtime.tensor(rotation.data), y)
            tolerance = 2e-6 if dtype == "float32" else 5e-3
            np.testing.assert_allclose(y.numpy(), rotation.apply(x.astype(np.float64)), rtol=0, atol=tolerance * 5)


def test_declines_dense_rotations():
    structure = Rotation.draw("dense", 64, 0).structure
    assert rotate_llvm(RotationShape(structure, 64, "float32"), host_target()) is None
