"""Where elements are between layers: every dim once, and every block within a lane."""

from __future__ import annotations

import pytest
from rotquant_tvm.schedules.local_layers_cuda import plan
from rotquant_tvm.schedules.vector_lanes_cuda import VectorLanes

from rotquant_tvm.formats import Rotation

CASES = [
    ("hurwitz", 64, "float16", 8),
    ("hurwitz", 128, "float16", 8),
    ("hurwitz", 128, "float32", 8),
    ("hurwitz", 256, "float32", 16),
    ("turbo", 128, "float16", 16),
    ("turbo", 512, "float16", 8),
]


@pytest.mark.parametrize(("family", "head_dim", "dtype", "elements"), CASES)
def test_layers_are_local_and_every_layout_holds_every_dim(family, head_dim, dtype, elements):
    lanes = VectorLanes.choose(head_dim, dtype, elements)
    layers = plan(lanes, Rotation.draw(family, head_dim, 7).structure)
    for layer in layers:
        for layout in (layer.inputs, layer.outputs, layer.after):
            assert sorted(layout.dim(place) for place in range(head_dim)) == list(range(head_dim))
        for register in range(lanes.elements):
            place = register << layer.inputs.lane_bits | 3 % lanes.lanes
            for tap in range(layer.block):
                other = layer.neighbour(register, tap) << layer.inputs.lane_bits | 3 % lanes.lanes
                assert layer.inputs.dim(place) ^ layer.inputs.dim(other) == tap << layer.bits[0]


def test_a_block_across_lanes_takes_three_shuffles_for_four_elements():
    lanes = VectorLanes.choose(128, "float16")
    layers = plan(lanes, [(4, 1), (4, 4), (4, 32)])
    moved = [sum(layer.across(register) > 0 for register in range(lanes.elements)) for layer in layers]
    assert moved == [4, 6, 0]  # one bit, two bits, and it stays


@pytest.mark.parametrize(
    ("head_dim", "structure"), [(80, [(4, 1), (4, 4)]), (64, [(3, 1)]), (64, [(64, 1)]), (128, [(4, 8)]), (64, [])]
)
def test_there_is_no_plan_for_other_rotations(head_dim, structure):
    assert plan(VectorLanes.choose(head_dim, "float16"), structure) is None
