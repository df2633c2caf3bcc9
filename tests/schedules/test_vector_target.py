from __future__ import annotations

import pytest
from rotquant_tvm.schedules.vector_target import VectorTarget
from tvm.target import Target


@pytest.mark.parametrize(
    ("target", "lanes", "registers"),
    [
        ({"kind": "llvm"}, 4, 16),
        ({"kind": "llvm", "mcpu": "x86-64"}, 4, 16),
        ({"kind": "llvm", "mcpu": "x86-64-v3"}, 8, 16),
        ({"kind": "llvm", "mcpu": "x86-64-v4"}, 16, 32),
        ({"kind": "llvm", "mcpu": "znver5"}, 16, 32),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu"}, 4, 32),
    ],
    ids=str,
)
def test_registers_follow_the_features(target, lanes, registers):
    assert VectorTarget.of(Target(target)) == VectorTarget(lanes, registers)
    assert VectorTarget.of(Target(target)).tile == 2 * lanes
