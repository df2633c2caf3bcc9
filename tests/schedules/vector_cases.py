"""What the tests of the CUDA kernels on plain vectors share: formats, vectors, and ways to run a kernel."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules import dequantize_cuda, quantize_cuda, roundtrip_cuda

from rotquant_tvm.codegen import compile_module
from rotquant_tvm.formats import EncodedKV, KVFormat
from rotquant_tvm.ops import Axes
from rotquant_tvm.ops.codec_shape import CodecShape
from rotquant_tvm.target import resolve_target

from .simulated_gpu import SimulatedGPU, cuda_target

AXES = Axes("cuda")
BUILD = {"quantize": quantize_cuda.build, "dequantize": dequantize_cuda.build, "roundtrip": roundtrip_cuda.build}

CASES = [  # format, head_dim, dtype, knobs
    ("iso4", 128, "float16", {}),
    ("iso2:raw", 64, "float16", {"elements": 16}),
    ("iso1-full:ip", 96, "float32", {"rows": 2}),
    ("iso3-full", 512, "float16", {}),
    ("planar1:mse", 80, "float16", {}),  # idle lanes
    ("planar4", 128, "float32", {"elements": 4}),
    ("rotor2:ip", 128, "float16", {"rows": 2, "warps": 2}),
    ("rotor3:norm", 80, "float32", {"elements": 16}),  # triples across chunks
    ("rotor4:mse", 64, "float32", {}),
    ("turbo3", 256, "float32", {}),
    ("turbo2:ip", 128, "float16", {"exchange": 0}),  # weights in registers and in shared memory
    ("turbo4:raw", 512, "float32", {}),
    ("hurwitz4", 80, "float16", {}),  # a stride that is no power of two, with idle lanes
    ("hurwitz3", 96, "float32", {"rows": 4, "blocks": 2}),  # and in several chunks
    ("hurwitz2:norm", 128, "float16", {"rows": 2}),
    ("hurwitz1", 256, "float16", {"elements": 4}),
    ("hurwitz3:norm", 128, "float32", {"weights": 32}),  # elements that lanes exchange between layers
]

PLAIN = [  # without a rotation
    ("q8_0", 128, "float16", {}),
    ("q8_0", 80, "float32", {"rows": 2}),  # half a block at the end
    ("q4_0", 64, "float32", {}),
    ("q4_0", 32, "float16", {"elements": 16}),
    ("f16", 96, "float32", {}),
    ("f16", 512, "float16", {}),
    ("bf16", 64, "float16", {"elements": 4}),
]


def with_gpu(*cases):
    """Every case on the simulated GPU, and on a real one where there is one."""
    real = pytest.mark.gpu, pytest.mark.skipif(not tvm.cuda(0).exist, reason="no CUDA device")
    both = [(*case, "simulated") for case in cases], [pytest.param(*case, "cuda", marks=real) for case in cases]
    return [case for kind in both for case in kind]


def target_of(where: str) -> tvm.target.Target:
    """The target of a place to run."""
    return resolve_target("cuda") if where == "cuda" else cuda_target()


def kernel(operator: str, codec, dtype: str, knobs: dict, target: tvm.target.Target):
    """The kernel that takes a definition's place."""
    found = BUILD[operator](CodecShape.describe(codec, dtype), target, **knobs)
    assert found is not None
    return found


def run(func, where: str, *arrays) -> list[np.ndarray]:
    """Run a kernel; returns the arrays after it."""
    if where == "simulated":
        arrays = [np.ascontiguousarray(a).copy() for a in arrays]
        SimulatedGPU(func)(*arrays)
        return arrays
    module = compile_module(tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")}), target_of(where))
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(a), tvm.cuda(0)) for a in arrays]
    module["kernel"](*tensors)
    return [tensor.numpy() for tensor in tensors]


def codec_of(text: str, head_dim: int, seed: int = 3):
    """A codec; seeds other than 0 show that coefficients are data."""
    return KVFormat.parse(text).codec(head_dim, seed)


def vectors(head_dim: int, dtype: str, count: int, seed: int = 0) -> np.ndarray:
    """Vectors of several magnitudes with an outlier channel."""
    rng = np.random.default_rng((head_dim, count, seed))
    x = rng.standard_normal((count, head_dim)) * rng.choice([1e-3, 1.0, 30.0], (count, 1))
    x[:, rng.integers(head_dim)] *= 20
    return x.astype(dtype)


def encode(codec, x: np.ndarray, knobs: dict, where: str) -> EncodedKV:
    """``quantize`` of x [n, d] into poisoned outputs."""
    codes = np.full(x.shape, 255, np.uint16 if codec.format.bits == 16 else np.uint8)
    gain = np.full((len(x), max(1, codec.gains_per_vector)), np.nan, np.float16)
    func = kernel("quantize", codec, str(x.dtype), knobs, target_of(where))
    codes, gain = run(func, where, x, codec.coefficients, codes, gain)[2:]
    return EncodedKV(codes, gain[:, : codec.gains_per_vector])


def compile_cubin(functions, arch: str) -> None:
    """Compile kernels with nvcc; skips the test without it."""
    from tvm.support import nvcc

    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    target = cuda_target(arch)
    named = {f"k{i}": func.with_attr("global_symbol", f"k{i}") for i, func in enumerate(functions)}
    source = compile_module(tvm.IRModule(named), target).mod.imports[0].inspect_source()
    with target:
        cubin = nvcc.compile_cuda(source, target_format="cubin", compiler="nvcc")
    assert len(cubin) > 0
