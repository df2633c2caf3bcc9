"""Operators of com.microsoft, each against onnxruntime on random inputs."""

from __future__ import annotations

import numpy as np
import pytest

from ...sampling import sampled
from .onnx_cases import Graph, imported, normal
from .step_runner import check

BATCH, SEQ, HEADS, DIM = 2, 3, 4, 16
WIDTH = HEADS * DIM


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.mark.parametrize("dtype", sampled([np.float32, np.float16], [np.float32]))
def test_elementwise_and_norms(rng, tmp_path, dtype):
    graph = Graph(dims={BATCH: "batch", SEQ: "seq"})
    x, skip = (graph.input(name, normal(rng, BATCH, SEQ, WIDTH, dtype=dtype)) for name in ("x", "skip"))
    weight, beta, bias = (graph.weight(name, normal(rng, WIDTH, dtype=dtype)) for name in ("weight", "beta", "bias"))
    outputs = [
        graph.contrib("FastGelu", [x]),
        graph.contrib("FastGelu", [x, bias]),
        graph.node("SimplifiedLayerNormalization", [x, weight], epsilon=1e-2, axis=-1),
        *graph.contrib("SkipSimplifiedLayerNormalization", [x, skip, weight], ["s0", "", "", "s1"], epsilon=1e-3)[::3],
        *graph.contrib("SkipSimplifiedLayerNormalization", [x, skip, weight, bias], ["s2", "", "", "s3"])[::3],
        *graph.contrib("SkipLayerNormalization", [x, skip, weight, beta, bias], ["l0", "", "", "l1"])[::3],
        graph.contrib("SkipLayerNormalization", [x, skip, weight], epsilon=1e-2),
    ]
    if dtype == np.float32:  # onnxruntime has these on CPUs in float32 alone
        outputs += [
            graph.contrib("Gelu", [x]),
            graph.contrib("BiasGelu", [x, bias]),
            graph.contrib("QuickGelu", [x], alpha=1.3),
            graph.contrib("QuickGelu", [x]),
        ]
    for name in outputs:
        graph.output(name, dtype, ["batch", "seq", WIDTH])
    check(graph, tmp_path, 1e-5 if dtype == np.float32 else 4e-3)


def test_products(rng, tmp_path):
    graph = Graph()
    a, b, square = (graph.input(name, normal(rng, *shape)) for name, shape in PRODUCTS.items())
    cases = [
        ([a, b], {"alpha": 0.3}),
        ([a, b], {"transA": 0, "transB": 0}),
        ([square, square], {"transA": 1}),
        ([square, square], {"transB": 1, "alpha": 2.0}),
        ([square, square], {"transBatchA": 1, "transBatchB": 1}),
        ([square, square], {"transBatchA": 1, "transA": 1, "transBatchB": 1, "transB": 1}),
    ]
    for operands, attributes in cases:
        graph.output(graph.contrib("FusedMatMul", operands, **attributes))
    check(graph, tmp_path)


PRODUCTS = {"a": (2, 3, 8), "b": (8, 5), "square": (4, 4, 4)}


def quantized(rng, rows: int, columns: int, bits: int, block: int, dtype=np.float32):
    """Codes [rows, blocks, bytes], scales and float zero points [rows, blocks], packed zero points."""
    blocks = -(-columns // block)
    codes = rng.integers(0, 256, (rows, blocks, block * bits // 8)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.1, (rows, blocks)).astype(dtype)
    zeros = rng.uniform(0, 2**bits - 1, (rows, blocks)).astype(dtype)
    packed = rng.integers(0, 256, (rows, -(-blocks * bits // 8))).astype(np.uint8)
    return codes, scales, zeros, packed


@pytest.mark.parametrize("dtype", sampled([np.float32, np.float16], [np.float32]))
def test_quantized_weights(rng, tmp_path, dtype):
    graph = Graph(dims={BATCH: "batch", SEQ: "seq"})
    count = 0
    for bits, block, columns in [(4, 16, 48), (4, 32, 72), (8, 32, 64), (4, 128, 160), (8, 16, 40), (2, 32, 64)]:
        x = graph.input(f"x{count}", normal(rng, BATCH, SEQ, columns, dtype=dtype), ["batch", "seq", columns])
        codes, scales, zeros, packed = quantized(rng, 24, columns, bits, block, dtype)
        codes, scales = graph.weight(f"codes{count}", codes), graph.weight(f"scales{count}", scales)
        sizes = {"N": 24, "K": columns, "bits": bits, "block_size": block}
        bias = graph.weight(f"bias{count}", normal(rng, 24, dtype=dtype))
        forms = [[x, codes, scales], [x, codes, scales, graph.weight(f"packed{count}", packed)]]
        if dtype == np.float32 and bits == 4:
            forms.append([x, codes, scales, graph.weight(f"zeros{count}", zeros)])
        if bits == 4:
            forms.append([x, codes, scales, None, None, bias])
        for operands in forms:
            graph.output(graph.contrib("MatMulNBits", operands, **sizes), dtype, ["batch", "seq", 24])
        count += 1
    check(graph, tmp_path, 1e-4 if dtype == np.float32 else 1e-2)


def test_quantized_weights_are_made_once(rng, tmp_path):
    graph = Graph(dims={BATCH: "batch", SEQ: "seq"})
    x = graph.input("x", normal(rng, BATCH, SEQ, 64))
    codes, scales, _, _ = quantized(rng, 24, 64, 4, 32)
    operands = [x, graph.weight("codes", codes), graph.weight("scales", scales)]
    for _ in range(2):
        graph.output(graph.contrib("MatMulNBits", operands, N=24, K=64, bits=4, block_size=32))
    step = imported(graph.model(), tmp_path)
    assert [weight.shape for weight in step.weights] == [(24, 64)]
    assert step.weights[0].dtype == np.float32


def test_quantized_embeddings(rng, tmp_path):
    graph = Graph(dims={BATCH: "batch", SEQ: "seq"})
    ids = graph.input("ids", rng.integers(0, 24, (BATCH, SEQ)))
    for bits, block in [(4, 16), (4, 32), (8, 16)]:
        codes, scales, _, packed = quantized(rng, 24, 64, bits, block)
        operands = [graph.weight(f"codes{bits}{block}", codes.reshape(24, -1)), ids]
        operands.append(graph.weight(f"scales{bits}{block}", scales))
        for extra in ([], [graph.weight(f"packed{bits}{block}", packed)]):
            attributes = {"bits": bits, "block_size": block, "quantize_axis": 1, "gather_axis": 0}
            graph.output(graph.contrib("GatherBlockQuantized", [*operands, *extra], **attributes))
    check(graph, tmp_path)


def test_rotary_embedding(rng, tmp_path):
    graph = Graph(dims={BATCH: "batch", SEQ: "seq"})
    flat = graph.input("flat", normal(rng, BATCH, SEQ, WIDTH))
    heads = graph.input("heads", normal(rng, BATCH, HEADS, SEQ, DIM), ["batch", HEADS, "seq", DIM])
    positions = graph.input("positions", rng.integers(0, 40, (BATCH, SEQ)))
    offset = graph.input("offset", np.array([7]), [1])
    full = [graph.weight(name, normal(rng, 40, DIM // 2)) for name in ("cos", "sin")]
    part = [graph.weight(name, normal(rng, 40, DIM // 4)) for name in ("cos_part", "sin_part")]
    partial = {"num_heads": HEADS, "rotary_embedding_dim": DIM // 2}
    for x, where, interleaved in [(flat, positions, 0), (flat, offset, 1), (heads, positions, 1), (heads, offset, 0)]:
        graph.output(graph.contrib("RotaryEmbedding", [x, where, *full], interleaved=interleaved))
    for interleaved in (0, 1):
        graph.output(graph.contrib("RotaryEmbedding", [flat, positions, *part], interleaved=interleaved, **partial))
    check(graph, tmp_path)
