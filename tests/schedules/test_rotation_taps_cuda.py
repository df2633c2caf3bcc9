"""Layers as taps: any layer of small blocks gives what its matrix gives, and its transpose what the transpose gives."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.held_rotation_cuda import HeldRotation
from rotquant_tvm.schedules.rotate_cuda import build
from rotquant_tvm.schedules.rotation_taps_cuda import LayerTaps
from rotquant_tvm.schedules.vector_lanes_cuda import VectorLanes

from rotquant_tvm.formats.rotation import BlockLayer, Rotation
from rotquant_tvm.ops.rotate import RotationShape

from .simulated_gpu import SimulatedGPU, cuda_target

LAYERS = [  # head_dim, block, stride, kind
    (64, 2, 1, "xor"),
    (64, 2, 32, "xor"),
    (128, 4, 2, "xor"),
    (96, 4, 8, "xor"),
    (96, 3, 1, "band"),
    (80, 3, 1, "band"),
    (80, 4, 20, "cycle"),
    (96, 2, 48, "cycle"),
    (48, 3, 16, "cycle"),
]


def layer_of(head_dim, block, stride):
    """A layer of arbitrary coefficients; zero where a band's tail overlaps its neighbour."""
    coefficients = np.random.default_rng(block).standard_normal((head_dim, block))
    rest = head_dim % (block * stride)
    if rest:
        coefficients[-rest:, : block - rest] = 0
    return BlockLayer(block, stride, coefficients)


@pytest.mark.parametrize("elements", [4, 8, 32])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("head_dim", "block", "stride", "kind"), LAYERS)
def test_taps_are_the_matrix(head_dim, block, stride, kind, dtype, elements):
    layer = layer_of(head_dim, block, stride)
    lanes = VectorLanes.choose(head_dim, dtype, elements)
    assert LayerTaps(lanes, block, stride).kind == kind
    rotation = Rotation(head_dim, (layer,))
    x = np.random.default_rng(0).standard_normal((1, 1, 5, head_dim)).astype(dtype)
    y = np.full_like(x, np.nan)
    shape = RotationShape(rotation.structure, head_dim, dtype)
    kernel = build(shape, cuda_target(), elements=elements, warps=1, blocks=1)
    SimulatedGPU(kernel)(x, rotation.data, y)
    tolerance = 2e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(y, x.astype(float) @ layer.matrix.T, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("head_dim", "block", "stride"), [(64, 64, 1), (64, 8, 1), (96, 3, 2), (96, 2, 12)])
def test_other_layers_have_no_taps(head_dim, block, stride):
    lanes = VectorLanes.choose(head_dim, "float16")
    assert LayerTaps(lanes, block, stride).kind is None
    assert not HeldRotation.possible(lanes, [(4, 1), (block, stride)])


def test_blocks_within_an_access_are_local():
    lanes = VectorLanes(128, "float16", 16)
    local = [LayerTaps(lanes, *layer).local for layer in ((4, 1), (2, 4), (4, 2), (4, 4), (3, 1))]
    assert local == [True, True, True, False, False]
