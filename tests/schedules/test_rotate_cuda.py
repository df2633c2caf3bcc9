"""The CUDA kernel of rotate against NumPy, on a simulated GPU and on a real one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from rotquant_tvm.schedules.rotate_cuda import build, rotate_cuda

from rotquant_tvm.formats import Rotation
from rotquant_tvm.ops import rotate
from rotquant_tvm.ops.rotate import RotationShape

from ..ops.reference import coefficients
from .simulated_gpu import cuda_target
from .vector_cases import AXES, compile_cubin, run, with_gpu

NUMPY = {"bfloat16": ml_dtypes.bfloat16}
CASES = [
    ("none", 64, "float16"),
    ("planar", 80, "float32"),
    ("iso", 96, "float16"),
    ("planar", 64, "bfloat16"),
    ("rotor", 128, "float16"),
    ("rotor", 80, "float32"),
    ("turbo", 64, "float32"),
    ("turbo", 512, "float16"),
    ("hurwitz", 80, "float16"),
    ("hurwitz", 80, "float32"),
    ("hurwitz", 128, "float16"),
    ("hurwitz", 256, "float32"),
]


def kernel_of(rotation, dtype, arch="sm_90a"):
    """The kernel for a rotation's structure."""
    found = build(RotationShape(rotation.structure, rotation.head_dim, dtype), cuda_target(arch))
    assert found is not None
    return found


@pytest.mark.parametrize(("family", "head_dim", "dtype", "where"), with_gpu(*CASES))
def test_rotates_as_numpy_does(family, head_dim, dtype, where):
    drawn = Rotation.draw(family, head_dim, 3)
    for rotation in (drawn, drawn.inverse()):
        for shape in ((1, 1, 1), (2, 3, 5)):
            x = np.random.default_rng(0).standard_normal((*shape, head_dim)).astype(NUMPY.get(dtype, dtype))
            y = run(kernel_of(rotation, dtype), where, x, coefficients(rotation), np.full_like(x, np.nan))[2]
            tolerance = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}[dtype]
            np.testing.assert_allclose(y.astype(float), rotation.apply(x.astype(np.float64)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_kernels_compile(arch):
    compile_cubin([kernel_of(Rotation.draw(family, head_dim), dtype, arch) for family, head_dim, dtype in CASES], arch)


def test_the_rule_takes_what_has_been_compared_on_a_gpu():
    def taken(family, head_dim, dtype):
        structure = Rotation.draw(family, head_dim).structure
        return rotate_cuda(rotate(structure, head_dim, dtype, AXES), cuda_target()) is not None

    assert taken("hurwitz", 256, "float16") and taken("rotor", 512, "float32")
    assert not taken("turbo", 512, "float16") and not taken("planar", 64, "bfloat16")


def test_it_declines_dense_rotations():
    structure = Rotation.draw("dense", 64).structure
    assert rotate_cuda(rotate(structure, 64, "float32", AXES), cuda_target()) is None
