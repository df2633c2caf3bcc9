"""The vector score kernel against NumPy in float64: formats, numbers of queries and tiles, instruction sets."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules.score_llvm import ROWS, TILES, score_llvm
from rotquant_tvm.schedules.vector_kv_kernels import VectorKVKernels
from tvm.target import Target

from rotquant_tvm import ops
from rotquant_tvm.formats import EncodedKV, KeyLayout, KVFormat
from rotquant_tvm.ops.score import ScoreShape, feature_count
from rotquant_tvm.target import host_target

GENERIC = {"kind": "llvm"}
AVX2 = {"kind": "llvm", "mcpu": "x86-64-v3"}
CASES = [
    ("f16", 64, None),
    ("bf16", 80, AVX2),
    ("q8_0", 96, None),
    ("q4_0", 80, None),
    ("q4_0", 64, GENERIC),
    ("rotor3:ip", 80, None),
    ("turbo3:ip", 128, None),
    ("turbo4", 128, AVX2),
    ("hurwitz2+tcq", 64, None),
    ("turbo2.5", 64, None),
    ("dense3.5", 96, AVX2),
    ("turbo3+qjl", 64, None),
    ("dense2+qjl", 80, AVX2),
    ("turbo4+qjl", 256, GENERIC),
    ("qjl1", 112, None),
]


@pytest.mark.parametrize(("text", "head_dim", "target"), CASES)
def test_scores(text, head_dim, target):
    rng = np.random.default_rng(head_dim)
    codec = KVFormat.parse(text).codec(head_dim)
    target = host_target() if target is None else Target(target)
    kernel = score_llvm(ScoreShape(text, head_dim), target).with_attr("global_symbol", "kernel")
    run = tvm.compile(tvm.IRModule({"kernel": kernel}), target)["kernel"]
    layout = KeyLayout(codec.format, head_dim)
    for queries, tiles in ((1, 1), (6, 3), (ROWS + 3, TILES + 1), (2, 0), (0, 2)):
        encoded = codec.encode(rng.standard_normal((tiles, 32, head_dim)) * rng.lognormal(size=(tiles, 32, 1)))
        words = layout.pack(encoded).view(np.uint32)
        flat = EncodedKV(*(part.reshape(tiles * 32, part.shape[-1]) for part in (encoded.codes, encoded.gain)))
        q = rng.standard_normal((queries, head_dim))
        features = codec.query_features(q).astype(np.float32)
        assert features.shape[1] == feature_count(codec)
        out = tvm.runtime.tensor(np.full((queries, 32 * tiles), np.nan, np.float32))
        run(tvm.runtime.tensor(features), tvm.runtime.tensor(words), out)
        size = np.linalg.norm(codec.query_features(q), axis=1)[:, None] * np.linalg.norm(codec.features(flat), axis=1)
        assert (np.abs(out.numpy() - codec.score(q, flat)) <= 2e-6 * size).all()


def test_the_pass_puts_it_in_the_definitions_place():
    func = ops.score(KVFormat.parse("turbo3:ip").codec(64), ops.Axes("llvm"))
    mod = VectorKVKernels(host_target())(tvm.IRModule({"score": func}))
    assert mod["score"].attrs["tirx.is_scheduled"] and "rotquant.score" not in mod["score"].attrs
