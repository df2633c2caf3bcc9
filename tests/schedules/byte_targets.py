"""The CPUs that integer attention is for, as far as this machine can run their code."""

from __future__ import annotations

import pytest
from tvm.target import Target
from tvm.target.codegen import target_has_features

from rotquant_tvm.target import host_target

BYTE_CPUS = {
    "permutes": ("x86-64-v4", ("avx512vnni", "avx512vbmi")),
    "whole": ("x86-64-v4", ("avx512vnni",)),
    "halves": ("x86-64-v3", ("avxvnni",)),
}
"""By what is different about them: mcpu and features beyond it."""


def byte_target(kind: str) -> Target:
    """The llvm target of a kind of CPU; skips the test where this machine is not one."""
    cpu, features = BYTE_CPUS[kind]
    base = "avx512bw" if cpu.endswith("v4") else "avx2"
    if not all(target_has_features(name, host_target()) for name in (base, *features)):
        pytest.skip(f"this CPU has no {', '.join(features)}")
    return Target({"kind": "llvm", "mcpu": cpu, "mattr": [f"+{name}" for name in features]})
