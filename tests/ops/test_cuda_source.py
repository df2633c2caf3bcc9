"""The CUDA kernels of every operator compile with nvcc and keep to 48 KB of static shared memory."""

from __future__ import annotations

import re
import shutil

import pytest
import tvm
from tvm.support import nvcc

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import Rotation

from ..sampling import sampled
from .cases import CASES, MIXED, SKETCHES, Case
from .reference import codec_of

SHARED_LIMIT = 48 * 1024
AXES = ops.Axes("cuda")
CODECS = [("f16", 64), ("q8_0", 80), ("dense2", 96), ("rotor4:ip", 80), ("hurwitz3", 256), ("turbo2+tcq", 256)]
CODECS += [("q4_0", 80), ("turbo3.5", 256), ("dense4+qjl", 256), ("qjl1", 96)]
SEARCHED = [("q8_0", 80), ("q4_0", 256), ("turbo2.5", 32), ("dense4+qjl", 256), ("hurwitz2+tcq", 256)]
WIDE = Case("hurwitz3/turbo4", 256, 16, 1)
"""The most scratch: head dimension 256, and 16 query heads to a kv head."""
CACHES = [CASES[0], MIXED, CASES[4], Case("q8_0/bf16", 96, 3, 3), WIDE, CASES[-1]]
TRELLIS = Case("hurwitz2+tcq/turbo3+tcq", 256, 2, 1)
APPENDS = [MIXED, CASES[4], Case("bf16/q8_0", 256, 1, 1), TRELLIS]
APPENDS += [Case("q4_0/turbo2.5", 128, 2, 2), SKETCHES[1]]

SEGMENTED = [CASES[0], TRELLIS]
POLICIES = [CachePolicy(sinks=4), CachePolicy(sinks=4, recent=8, center=64, defer=9)]

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def _codec_operators(text, head_dim):
    codec = codec_of(text, head_dim)
    yield ops.quantize(codec, "float16", AXES)
    yield ops.dequantize(codec, "float16", AXES)
    yield ops.roundtrip(codec, "float32", AXES)


def _search():
    for text, head_dim in SEARCHED:
        codec = codec_of(text, head_dim)
        yield ops.score(codec, AXES)
        yield ops.query_features(codec, "float16", AXES)
        yield ops.encode_tiles(codec, "float32", AXES)


def _attention(build, case, dtype="float16", **options):
    return build(*case.codecs, case.heads, case.kv_heads, 0.1, dtype, AXES, **options)


def _policies():
    yield from (ops.plan_flush(policy, AXES, chunk=chunk) for policy in POLICIES for chunk in (True, False))
    for policy in POLICIES:
        for case in SEGMENTED:
            heads, head_dim = case.kv_heads, case.codecs[0].head_dim
            yield ops.flush(*case.codecs, heads, "float16", policy, AXES, after=case.heads)
            yield ops.append_plain(heads, head_dim, 100, "float32", policy, AXES)
            rotations = tuple(codec.rotation.structure for codec in case.codecs)
            yield ops.append_plain(heads, head_dim, 100, "float16", policy, AXES, rotations=rotations)
            yield ops.dequantize_segments(*case.codecs, heads, policy, AXES)
    yield ops.split_centre(3, 80, "float16", 4, 64, AXES)
    yield ops.join((2, "float32"), ((5, "float16"),), AXES)


def _segmented_attention(build, **options):
    yield from (_attention(build, c, policy=p, window=9, **options) for c in SEGMENTED for p in POLICIES)


def _rings():
    for case in (CASES[0], MIXED):
        for after in (0, case.heads):
            yield ops.append(*case.codecs, case.kv_heads, "float16", AXES, wraps=True, after=after)
        for policy in POLICIES:
            yield ops.flush(*case.codecs, case.kv_heads, "float16", policy, AXES, wraps=True, after=case.heads)
            yield ops.dequantize_segments(*case.codecs, case.kv_heads, policy, AXES, wraps=True)


def _dense():
    for chunk in (True, False):
        yield ops.attention_dense(16, 1, 256, 0.1, "float16", AXES, chunk=chunk, window=100, sinks=4 if chunk else 0)


def _rotations():
    for family, head_dim in [("none", 64), ("planar", 80), ("rotor", 128), ("turbo", 256), ("dense", 96)]:
        yield ops.rotate(Rotation.draw(family, head_dim).structure, head_dim, "float16", AXES)


OPERATORS = {
    "advance": lambda: [ops.advance(AXES)],
    "rotate": _rotations,
    "codec": lambda: [func for case in CODECS for func in _codec_operators(*case)],
    "search": _search,
    "append": lambda: [ops.append(*c.codecs, c.kv_heads, "float16", AXES) for c in APPENDS],
    "dequantize_cache": lambda: [ops.dequantize_cache(*c.codecs, c.kv_heads, AXES) for c in CACHES],
    "policy": _policies,
    "rings": _rings,
    "segmented decode": lambda: _segmented_attention(ops.attention_decode, splits=8),
    "segmented prefill": lambda: _segmented_attention(ops.attention_prefill),
    "attention_dense": _dense,
    "attention_decode": lambda: [_attention(ops.attention_decode, c, splits=8, window=9) for c in CACHES],
    "attention_prefill": lambda: [_attention(ops.attention_prefill, c, window=9) for c in CACHES],
    "rotated prefill": lambda: [_attention(ops.attention_prefill, CACHES[0], rotated=True)],
}


def cuda_target(arch: str) -> tvm.target.Target:
    """A GPU that need not be there."""
    return tvm.target.Target(
        {
            "kind": "cuda",
            "arch": arch,
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": SHARED_LIMIT,
            "thread_warp_size": 32,
            "host": "llvm",
        }
    )


def cuda_source(functions, target: tvm.target.Target) -> str:
    """The CUDA source that TVM generates for PrimFuncs."""
    named = {f"kernel_{i}": func for i, func in enumerate(functions)}
    mod = tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in named.items()})
    return tvm.compile(mod, target).mod.imports[0].inspect_source()


def shared_bytes(source: str) -> dict[str, int]:
    """Static shared memory of each kernel, from its declarations."""
    sizes = {"float": 4, "uint": 4, "int": 4, "half": 2, "ushort": 2, "unsigned short": 2, "uchar": 1}
    found = {}
    for text in source.split("__global__")[1:]:
        head, brace, body = text.partition("{")
        if not brace or ";" in head:  # a declaration
            continue
        declared = re.findall(r"__shared__ (?:alignas\((\d+)\) )?([\w ]+?) \w+\[(\d+)\]", body)
        assert len(declared) == body.count("__shared__")
        name = re.findall(r"(\w+)\(", head)[-1]
        found[name] = sum(-(-sizes[kind] * int(n) // int(a or 1)) * int(a or 1) for a, kind, n in declared)
    return found


LONG = {"rings", "policy", "append", "dequantize_cache", "segmented decode", "attention_prefill", "rotated prefill"}
"""Operators whose many kernels take nvcc long."""


@needs_nvcc
@pytest.mark.parametrize("arch", sampled(["sm_80", "sm_90a"], ["sm_90a"]))
@pytest.mark.parametrize("operator", sampled(OPERATORS, OPERATORS.keys() - LONG))
def test_kernels_compile(operator, arch):
    target = cuda_target(arch)
    functions = list(OPERATORS[operator]())
    source = cuda_source(functions, target)
    used = shared_bytes(source)
    assert len(used) >= len(functions) and max(used.values()) <= SHARED_LIMIT, used
    with target:
        cubin = nvcc.compile_cuda(source, target_format="cubin", compiler="nvcc")
    assert len(cubin) > 0
