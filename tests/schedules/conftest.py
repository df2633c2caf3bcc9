"""Fixtures for schedule tests: the CPUs to compile for, and a way to run one PrimFunc."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm.target import Target
from tvm.target.codegen import llvm_cpu_has_features

CPUS = {"x86-64": (), "x86-64-v3": ("avx2", "fma", "f16c"), "x86-64-v4": ("avx512f", "avx512vl")}


@pytest.fixture(params=CPUS)
def target(request) -> Target:
    """An llvm target of each vector width that this machine can run."""
    host = Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    if not all(llvm_cpu_has_features(feature, host) for feature in CPUS[request.param]):
        pytest.skip(f"this CPU is no {request.param}")
    return Target({"kind": "llvm", "mcpu": request.param})


@pytest.fixture
def run(target):
    """Compile a PrimFunc (once), run it on arrays, and return its last ``outputs`` arguments as arrays."""
    libraries = {}

    def call(func, *arrays, outputs=1):
        if func not in libraries:
            module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
            libraries[func] = tvm.compile(module, target)
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays]
        libraries[func]["main"](*tensors)
        return [t.numpy() for t in tensors[-outputs:]]

    return call
