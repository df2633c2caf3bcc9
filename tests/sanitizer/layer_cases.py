"""Kernels on plain vectors, and those of a model's other layers, at small, odd sizes."""

from __future__ import annotations

import numpy as np
from rotquant_tvm.schedules.linear_cuda import FEW, MANY, WARPGROUPS, CUDALinear, cuda_linear
from rotquant_tvm.schedules.linear_many_rows_cuda import ManyRows
from rotquant_tvm.schedules.linear_warpgroups_cuda import has_warpgroups
from rotquant_tvm.schedules.rms_norm_cuda import rms_norm
from rotquant_tvm.schedules.rotary_cuda import RotaryShape, rotary
from tvm.target import Target

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import KeyLayout
from rotquant_tvm.ops.score import feature_count

from ..ops.cases import Case
from ..ops.reference import codec_of, coefficients
from .kernel_cases import KernelCase, Launch, cache_arrays, case, chosen, counts, normal, numbers

ROWS = 37
SMALL = (ManyRows(32, 32, 16, 16, stages=2),)
VECTORS = [
    ("hurwitz3", 128, "float16"),
    ("iso3", 80, "float32"),
    ("planar4:mse", 256, "float16"),
    ("rotor3", 48, "float32"),
    ("turbo3", 128, "float16"),
    ("q8_0", 80, "float16"),
    ("q4_0", 64, "float32"),
    ("bf16", 64, "float16"),
    ("turbo2.5", 64, "float16"),
    ("hurwitz2+tcq", 64, "float32"),
    ("dense2+qjl", 80, "float32"),
]


def vector_launch(name: str, operator: str, text: str, d: int, dtype: str) -> Launch:
    """Quantize, dequantize, both, or rotate vectors."""
    codec, rng, lead = codec_of(text, d), numbers(text, d), (1, 1, ROWS, d)
    x = normal(rng, dtype, ROWS, d)
    there, back = codec.coefficients, codec.inverse_coefficients
    if operator == "rotate":
        build = chosen(lambda axes: ops.rotate(codec.rotation.structure, d, dtype, axes))
        return Launch(build, [x.reshape(lead), coefficients(codec.rotation), np.empty(lead, dtype)], 1)
    build = chosen(lambda axes: getattr(ops, operator)(codec, dtype, axes))
    if operator == "roundtrip":
        return Launch(build, [x.reshape(lead), there, back, np.empty(lead, dtype)], 1)
    encoded = codec.encode(x)
    gain = encoded.gain if codec.gains_per_vector else np.zeros((ROWS, 1), np.float16)
    if operator == "dequantize":
        return Launch(build, [encoded.codes, gain, back, np.empty_like(x)], 1)
    # 16-bit formats leave the gains as they are.
    return Launch(build, [x, there, encoded.codes, gain], 2 if codec.gains_per_vector else 0)


def vector_cases() -> list[KernelCase]:
    """Kernels on plain vectors."""
    found = []
    for text, d, dtype in VECTORS:
        name = "".join(c if c.isalnum() else "_" for c in f"{text}_d{d}")
        rotated = text[:2] not in ("q8", "q4", "bf")
        operators = ["quantize", "dequantize", "roundtrip", *(["rotate"] if rotated else [])]
        found += [case(operator, name, vector_launch, operator, text, d, dtype) for operator in operators]
    return found


def score_launch(name: str, text: str, d: int) -> Launch:
    """Inner products with packed vectors."""
    codec, rng = codec_of(text, d), numbers(text)
    encoded = codec.encode(rng.standard_normal((3, 32, d)))
    words = KeyLayout(codec.format, d).pack(encoded).view(np.uint32)
    features = codec.query_features(normal(rng, "float32", 5, d)).astype(np.float32)
    return Launch(chosen(lambda axes: ops.score(codec, axes)), [features, words, np.empty((5, 96), np.float32)], 1)


def features_launch(name: str, text: str, d: int) -> Launch:
    """Queries as such products take them."""
    codec = codec_of(text, d)
    q, out = normal(numbers(text), "float32", 5, d), np.empty((5, feature_count(codec)), np.float32)
    return Launch(chosen(lambda axes: ops.query_features(codec, "float32", axes)), [q, codec.coefficients, out], 1)


def search_cases() -> list[KernelCase]:
    """Kernels of a search by inner product."""
    formats = (("iso3", "iso3", 80), ("sketched", "turbo3+qjl", 64))
    return [
        *(case("score", name, score_launch, text, d) for name, text, d in formats),
        *(case("query_features", name, features_launch, text, d) for name, text, d in formats),
    ]


def read_launch(name: str) -> Launch:
    """A whole cache read back."""
    sizes, rng, lengths = Case("iso4/planar2", 80, 6, 2), numbers(name), counts(70, 0, 33)
    (cache,) = cache_arrays(rng, sizes, lengths, 3)
    read = [np.empty((3, 2, 96, 80), np.float32) for _ in "kv"]
    return Launch(chosen(lambda axes: ops.dequantize_cache(*sizes.codecs, 2, axes)), [cache, lengths, *read], 2)


def plan_launch(name: str) -> Launch:
    """What leaves the ring."""
    defer = CachePolicy(sinks=4, recent=8, center=64, defer=64)
    build = chosen(lambda axes: ops.plan_flush(defer, axes, chunk=True))
    return Launch(build, [counts(64, 0, 0), counts(300, 70, 0), counts(0, 0, 0)], 1)


def state_cases() -> list[KernelCase]:
    """What moves counts along, and reads a whole cache back."""
    return [case("dequantize_cache", "main", read_launch), case("plan_flush", "chunk", plan_launch)]


def norm_launch(name: str, features: int) -> Launch:
    """RMS norm."""
    rng = numbers(name)
    arrays = [normal(rng, "float16", 5, features), normal(rng, "float16", features), np.zeros((5, features), "f2")]
    return Launch(lambda target: rms_norm(features, 1e-5, 1, target), arrays, 1)


def rotary_launch(name: str, shape: RotaryShape) -> Launch:
    """Rotary embeddings of several tensors."""
    rng, d = numbers(name), shape.head_dim
    xs = [normal(rng, "float16", 2, 7, n, d) for n in shape.heads]
    angles = [normal(rng, "float16", 2, 1, 7, d) for _ in range(2)]
    heads = zip(shape.heads, shape.heads_first, strict=True)
    ys = [np.zeros((2, n, 7, d) if first else (2, 7, n, d), "f2") for n, first in heads]
    return Launch(lambda target: rotary(shape, target), [*xs, *angles, *ys], len(ys))


def linear_launch(name: str, spec: CUDALinear, rows: int, few: tuple, many: tuple) -> Launch:
    """Linear layers; where there are no warpgroups, those for many rows without."""
    rng = numbers(name)
    x = normal(rng, "float16", rows, spec.in_features)
    weight = normal(rng, "float16", sum(spec.out_features), spec.in_features)
    biases = [normal(rng, "float16", n) for n, has in zip(spec.out_features, spec.bias, strict=True) if has]
    added = [normal(rng, "float16", rows, spec.out_features[0])] if spec.residual else []
    results = [np.zeros((rows, n), "float16") for n in spec.outputs]

    def build(target: Target):
        return cuda_linear(spec, target, few, MANY if many[0].warpgroups and not has_warpgroups(target) else many)

    return Launch(build, [x, weight, *biases, *added, *results], len(results))


def layer_cases() -> list[KernelCase]:
    """Norms, rotary embeddings and linear layers, on CUDA."""
    three = CUDALinear(192, (24, 17, 8), (True, False, True), leading=1)
    gated = CUDALinear(64, (13, 13), (False, False), gated=True, leading=1)
    residual = CUDALinear(64, (33,), (True,), residual=True, leading=1)
    few = (("three", three, 7), ("three", three, 13), ("gated", gated, 1), ("residual", residual, 13))
    linear = [(f"{name}_few_{rows}", spec, rows, FEW, SMALL) for name, spec, rows in few]
    linear += [("three_many", three, 70, (), SMALL)]
    linear += [(f"gated_many_{n}", gated, 70, (), (knobs,)) for n, knobs in enumerate(MANY)]
    linear += [(f"residual_warpgroups_{n}", residual, 130, (), (knobs,)) for n, knobs in enumerate(WARPGROUPS)]
    shapes = RotaryShape((4, 2), (False, True), 64), RotaryShape((3,), (True,), 80)
    return [
        *(case("rms_norm", f"n{n}", norm_launch, n, cuda=True) for n in (248, 576, 4096)),
        *(case("rotary", f"d{shape.head_dim}", rotary_launch, shape, cuda=True) for shape in shapes),
        *(case("linear", name, linear_launch, *rest, cuda=True) for name, *rest in linear),
    ]
