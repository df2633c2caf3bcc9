"""What a compile target asks of the machines that its libraries run on."""

from __future__ import annotations

import tvm
from tvm.target.codegen import llvm_get_cpu_features, llvm_get_system_triple

from .runtime.requirements import Requirements, machine_name

_LINUX_NAMES = {
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "popcnt": "popcnt",
    "lzcnt": "abm",
    "movbe": "movbe",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "f16c": "f16c",
    "fma": "fma",
    "avx": "avx",
    "avx2": "avx2",
    "avxvnni": "avx_vnni",
    "gfni": "gfni",
    "avx512f": "avx512f",
    "avx512cd": "avx512cd",
    "avx512bw": "avx512bw",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    # 64-bit ARM
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
    "fp16fml": "asimdfhm",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "lse": "atomics",
}
"""By LLVM's name of an instruction set that it uses of its own accord, Linux's."""


def requirements(target: tvm.target.Target, cuda_code: str | None = None) -> Requirements:
    """Return what a library of ``target`` needs; ``cuda_code``: the form of its CUDA code (``device_code``)."""
    cuda = target.kind.name == "cuda"
    host = target.host if cuda else target
    triple = str(host.attrs.get("mtriple", "")) or str(llvm_get_system_triple())
    features = {str(name) for name in llvm_get_cpu_features(host)}
    return Requirements(
        machine=machine_name(triple.partition("-")[0]),
        cpu=str(host.attrs.get("mcpu", "")) or "generic",
        cpu_features=tuple(linux for llvm, linux in _LINUX_NAMES.items() if llvm in features),
        cuda_arch=str(target.attrs["arch"]) if cuda else None,
        cuda_code=cuda_code if cuda else None,
    )
