"""What CUDA targets say, or their architectures imply."""

from __future__ import annotations

import pytest
from rotquant_tvm.schedules.cuda_target import (
    compute_capability,
    dynamic_shared_memory,
    has_bulk_copies,
    multiprocessors,
)
from tvm.target import Target


@pytest.mark.parametrize(
    ("arch", "said", "expected"),
    [
        ("sm_90a", 49152, 232448),  # as read off a device
        ("sm_90a", 100000, 100000),
        ("sm_80", 49152, 166912),
        ("sm_89", 49152, 101376),
        ("sm_120", 49152, 101376),
        ("sm_60", 49152, 49152),
    ],
)
def test_shared_memory(arch, said, expected):
    target = Target({"kind": "cuda", "arch": arch, "max_shared_memory_per_block": said})
    assert dynamic_shared_memory(target) == expected


def test_compute_capability():
    assert compute_capability(Target({"kind": "cuda", "arch": "sm_100a"})) == 100


def test_what_an_architecture_implies():
    hopper, ampere = (Target({"kind": "cuda", "arch": arch}) for arch in ("sm_90a", "sm_86"))
    assert has_bulk_copies(hopper) and not has_bulk_copies(ampere)
    assert (multiprocessors(hopper), multiprocessors(ampere)) == (132, 84)
