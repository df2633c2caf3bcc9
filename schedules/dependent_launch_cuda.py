"""Kernels that start before the one before them has ended (programmatic dependent launch, sm_90 and newer).

A kernel that calls ``wait_for_inputs`` may be launched early: what it does before that call, like reading weights, runs
beside the end of its predecessor. A kernel that calls ``let_next_start`` tells from when on its successor may do so: as
soon as all of its blocks have; else that is at its end. All that a kernel writes, and all that it reads of what others
write, comes after the wait (but for hints that no result depends on, read past the L1 cache); these reads are spelled
as instructions (``ld.global``, never ``ld.global.nc``), which the compiler leaves in their place.
"""

from __future__ import annotations

from tvm.target import Target

from .cuda_ops import ptx
from .cuda_target import compute_capability

BY_DEFAULT = True
"""Whether kernels start early where nothing else is asked for; a kernel's results must not depend on it."""


def starts_early(target: Target) -> bool:
    """Whether kernels start early unless they are told otherwise: the GPU must have such launches."""
    return BY_DEFAULT and compute_capability(target) >= 90


def wait_for_inputs(early: bool = True) -> None:
    """Wait until all kernels before have ended; nothing unless ``early``."""
    if early:
        ptx("griddepcontrol.wait")


def let_next_start(early: bool = True) -> None:
    """Allow the next kernel to start; nothing unless ``early``."""
    if early:
        ptx("griddepcontrol.launch_dependents")
