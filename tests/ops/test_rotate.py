"""Rotate against the rotation's matrix, for every family."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm import ops
from rotquant_tvm.formats import Rotation, rotation_families
from rotquant_tvm.ops.rotate import RotationShape

from .reference import coefficients

ROTATIONS = [
    ("none", 64),
    ("planar", 80),
    ("iso", 96),
    ("iso-full", 64),
    ("rotor", 64),
    ("rotor", 80),
    ("rotor", 128),
    ("turbo", 64),
    ("turbo", 128),
    ("turbo", 256),
    ("dense", 96),
    ("hurwitz", 64),
    ("hurwitz", 80),
    ("hurwitz", 256),
]
SHAPE = (2, 3, 5)


def rotated(kernels, poisoned, rotation, x):
    kernel = kernels.build(ops.rotate, rotation.structure, rotation.head_dim, str(x.dtype))
    return kernels.run(kernel, x, coefficients(rotation), poisoned(x.shape, x.dtype), writes=(-1,))


def test_the_cases_have_every_family():
    assert {family for family, _ in ROTATIONS} == set(rotation_families())


@pytest.mark.parametrize(("family", "head_dim"), ROTATIONS)
def test_rotate_multiplies_by_the_matrix_and_back(kernels, rng, poisoned, family, head_dim):
    rotation = Rotation.draw(family, head_dim, seed=3)
    x = rng.standard_normal((*SHAPE, head_dim)).astype(np.float32)
    y = rotated(kernels, poisoned, rotation, x)
    np.testing.assert_allclose(y, x @ rotation.matrix().T, atol=5e-6)
    np.testing.assert_allclose(rotated(kernels, poisoned, rotation.inverse(), y), x, atol=5e-6)


@pytest.mark.parametrize(("family", "head_dim"), [("rotor", 80), ("hurwitz", 64)])
def test_half_precision_is_rounded_once(kernels, rng, poisoned, family, head_dim):
    rotation = Rotation.draw(family, head_dim, seed=4)
    x = rng.standard_normal((*SHAPE, head_dim)).astype(np.float16)
    y = rotated(kernels, poisoned, rotation, x)
    exact = x.astype(np.float64) @ rotation.matrix().T
    step = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
    assert y.dtype == np.float16
    assert (np.abs(y - exact) <= 0.51 * step + 2e-6).all()


def test_the_shape_is_recorded_for_the_schedules():
    func = ops.rotate(((4, 1), (4, 4)), 64, "float16", ops.Axes("llvm"))
    assert RotationShape.of(func) == RotationShape(((4, 1), (4, 4)), 64, "float16")
