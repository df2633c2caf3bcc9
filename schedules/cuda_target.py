"""What a CUDA target says, or its architecture implies, about the GPU."""

from __future__ import annotations

from tvm.target import Target

STATIC_SHARED = 48 * 1024
"""Shared memory that any block may declare; a kernel has to ask for more, and then gets what the architecture has."""
DYNAMIC_SHARED = {70: 96, 72: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227}
"""KiB that a block may ask for, by compute capability; newer ones than these have at least ``OTHER_SHARED``."""
OTHER_SHARED = 99

MULTIPROCESSORS = {80: 108, 86: 84, 87: 16, 89: 142, 90: 132, 100: 148, 120: 170}
"""Streaming multiprocessors of the largest GPU of a compute capability."""


def compute_capability(target: Target) -> int:
    """10 · major + minor of the target's architecture, 0 if it names none."""
    digits = "".join(c for c in str(target.attrs.get("arch", "")) if c.isdigit())
    return int(digits or 0)


def dynamic_shared_memory(target: Target) -> int:
    """Bytes of shared memory that a block may ask for.

    Targets read off a device, and TVM's tags of data-centre GPUs, say what may be declared, which is less.
    """
    said = int(target.attrs.get("max_shared_memory_per_block", STATIC_SHARED))
    if said > STATIC_SHARED:
        return said
    capability = compute_capability(target)
    if capability < min(DYNAMIC_SHARED):
        return said
    return 1024 * DYNAMIC_SHARED.get(capability, OTHER_SHARED)


def multiprocessors(target: Target) -> int:
    """How many streaming multiprocessors the target's GPU is taken to have."""
    return MULTIPROCESSORS.get(compute_capability(target), 132)


def has_bulk_copies(target: Target) -> bool:
    """Whether the GPU copies asynchronously in bulk (sm_90 and newer)."""
    return compute_capability(target) >= 90
