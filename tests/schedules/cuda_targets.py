"""CUDA targets to compile for without a GPU, and the check that a kernel becomes machine code for one."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import tvm
from tvm.target import Target

from rotquant_tvm.codegen import compile_module
from rotquant_tvm.target import resolve_target

ARCHITECTURES = ("sm_80", "sm_90a")


def target_of(arch: str) -> Target:
    """A data-centre GPU of an architecture."""
    attributes = {"max_threads_per_block": 1024, "max_num_threads": 1024, "thread_warp_size": 32}
    shared = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376}.get(arch, 232448)
    return Target(
        {"kind": "cuda", "arch": arch, "max_shared_memory_per_block": shared, **attributes, "host": {"kind": "llvm"}}
    )


def cubin(build, arch: str) -> bytes:
    """The machine code of the kernel that ``build(target)`` makes; skips without nvcc."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    kernel = build(target_of(arch)).with_attr("global_symbol", "kernel")
    source = compile_module(tvm.IRModule({"kernel": kernel}), target_of(arch)).mod.imports[0].inspect_source()
    command = ["nvcc", f"-arch={arch}", "-cubin", "--use_fast_math", "-x", "cu", "-o", "/dev/stdout", "-"]
    result = subprocess.run(command, input=source.encode(), capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    return result.stdout


def this_gpu() -> Target:
    """The GPU at hand, on Hopper with the instructions that are its own."""
    target = resolve_target("cuda")
    arch = str(target.attrs["arch"])
    return target_of("sm_90a" if arch == "sm_90" else arch)
