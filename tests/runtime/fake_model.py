"""A library that TVM really compiles, over a "model" that a few lines of NumPy repeat exactly.

Layer 0 stores the low byte of every token id, layer 1 (two kv heads) its high byte and a mark made of id and
position. The logits are a sum of small integers looked up for every stored token, so they are exact in any
order of summation and change with every token, its position, and every byte of the cache.
"""

from __future__ import annotations

import json

import numpy as np
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

VOCAB = 260
ROWS = 97
MAX_POSITION = 4096

INFO = {
    "version": 2,
    "layout_version": 1,
    "layers": [
        {"kv_heads": 1, "head_dim": 32, "k": "hurwitz3", "v": "hurwitz3", "tile_bytes": 32},
        {"kv_heads": 2, "head_dim": 32, "k": "hurwitz3", "v": "f16", "tile_bytes": 64},
    ],
    "vocab_size": VOCAB,
    "max_position": MAX_POSITION,
    "dtype": "float32",
    "weights": ["weight_0000", "weight_0001"],
}
INFO_JSON = json.dumps(INFO)


def module() -> tvm.IRModule:
    """The Relax module with the four functions of a compiled library."""

    @I.ir_module
    class FakeModel:
        @T.prim_func(private=True)
        def step(
            ids_handle: T.handle,
            new_handle: T.handle,
            low_handle: T.handle,
            high_handle: T.handle,
            lengths_handle: T.handle,
            table: T.Buffer((ROWS, VOCAB), "float32"),
            bias: T.Buffer((VOCAB,), "bfloat16"),
            logits_handle: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            batch = T.int64()
            seq = T.int64()
            tiles = T.int64()
            ids = T.match_buffer(ids_handle, (batch, seq), "int32")
            new_lengths = T.match_buffer(new_handle, (batch,), "int32")
            low = T.match_buffer(low_handle, (batch, 1, tiles, 32), "uint8")
            high = T.match_buffer(high_handle, (batch, 2, tiles, 64), "uint8")
            lengths = T.match_buffer(lengths_handle, (batch,), "int32")
            logits = T.match_buffer(logits_handle, (batch, VOCAB), "float32")
            for b in range(batch):
                for s in range(seq):
                    if s < new_lengths[b]:
                        place: T.int32 = lengths[b] + T.cast(s, "int32")
                        low[b, 0, place // 32, place % 32] = T.cast(ids[b, s] % 256, "uint8")
                        high[b, 0, place // 32, place % 32] = T.cast(ids[b, s] // 256, "uint8")
                        high[b, 1, place // 32, place % 32] = T.cast((ids[b, s] * 3 + place) % 251, "uint8")
                lengths[b] = lengths[b] + new_lengths[b]
                for v in range(VOCAB):
                    logits[b, v] = T.cast(bias[v], "float32")
                for p in range(lengths[b]):
                    token: T.int32 = T.cast(low[b, 0, p // 32, p % 32], "int32") + 256 * T.cast(
                        high[b, 0, p // 32, p % 32], "int32"
                    )
                    row: T.int32 = (token * 7 + T.cast(high[b, 1, p // 32, p % 32], "int32") * p) % ROWS
                    for v in range(VOCAB):
                        logits[b, v] = logits[b, v] + table[row, v]

        @R.function
        def kv_cache_info() -> R.Object:
            return R.str(INFO_JSON)

        @R.function
        def create_kv_cache(batch: R.Prim("int64"), capacity: R.Prim("int64")):
            with R.dataflow():
                low = R.zeros(R.shape([batch, 1, (capacity + 31) // 32, 32]), "uint8")
                high = R.zeros(R.shape([batch, 2, (capacity + 31) // 32, 64]), "uint8")
                lengths = R.zeros(R.shape([batch]), "int32")
                cache = (low, high, lengths)
                R.output(cache)
            return cache

        @R.function
        def prefill(
            ids: R.Tensor(("batch", "seq"), "int32"),
            new_lengths: R.Tensor(("batch",), "int32"),
            low: R.Tensor(("batch", 1, "tiles", 32), "uint8"),
            high: R.Tensor(("batch", 2, "tiles", 64), "uint8"),
            lengths: R.Tensor(("batch",), "int32"),
            table: R.Tensor((ROWS, VOCAB), "float32"),
            bias: R.Tensor((VOCAB,), "bfloat16"),
        ):
            batch = T.int64()
            tiles = T.int64()
            cls = FakeModel
            with R.dataflow():
                out = R.call_tir_inplace(
                    cls.step,
                    (ids, new_lengths, low, high, lengths, table, bias),
                    inplace_indices=[2, 3, 4, -1],
                    out_ty=[
                        R.Tensor((batch, 1, tiles, 32), "uint8"),
                        R.Tensor((batch, 2, tiles, 64), "uint8"),
                        R.Tensor((batch,), "int32"),
                        R.Tensor((batch, VOCAB), "float32"),
                    ],
                )
                logits = out[3]
                R.output(logits)
            return logits

        @R.function
        def decode(
            ids: R.Tensor(("batch", 1), "int32"),
            low: R.Tensor(("batch", 1, "tiles", 32), "uint8"),
            high: R.Tensor(("batch", 2, "tiles", 64), "uint8"),
            lengths: R.Tensor(("batch",), "int32"),
            table: R.Tensor((ROWS, VOCAB), "float32"),
            bias: R.Tensor((VOCAB,), "bfloat16"),
        ):
            batch = T.int64()
            tiles = T.int64()
            cls = FakeModel
            with R.dataflow():
                new_lengths = R.ones(R.shape([batch]), "int32")
                out = R.call_tir_inplace(
                    cls.step,
                    (ids, new_lengths, low, high, lengths, table, bias),
                    inplace_indices=[2, 3, 4, -1],
                    out_ty=[
                        R.Tensor((batch, 1, tiles, 32), "uint8"),
                        R.Tensor((batch, 2, tiles, 64), "uint8"),
                        R.Tensor((batch,), "int32"),
                        R.Tensor((batch, VOCAB), "float32"),
                    ],
                )
                logits = out[3]
                R.output(logits)
            return logits

    return FakeModel


def compile_library() -> tvm.runtime.Executable:
    """Compile the module for the CPU."""
    compiled = module()
    relax.analysis.well_formed(compiled)
    return tvm.compile(compiled, "llvm")


def weights() -> dict[str, np.ndarray]:
    """The lookup table (float32) and a bias (bfloat16) that makes the model prefer printable ASCII."""
    import ml_dtypes

    table = np.random.default_rng(7).integers(-8, 9, (ROWS, VOCAB)).astype(np.float32)
    bias = np.zeros(VOCAB, np.float32)
    bias[32:127] = 4096
    return {"weight_0000": table, "weight_0001": bias.astype(ml_dtypes.bfloat16)}


def reference_logits(ids) -> np.ndarray:
    """The logits, float32 [VOCAB], after the tokens ``ids``."""
    stored = weights()
    tokens = np.asarray(ids, np.int64)
    places = np.arange(len(tokens))
    rows = (tokens * 7 + (tokens * 3 + places) % 251 * places) % ROWS
    return stored["weight_0001"].astype(np.float32) + stored["weight_0000"][rows].sum(axis=0)


def reference_greedy(ids, count: int) -> list[int]:
    """The ``count`` tokens that greedy decoding puts after ``ids``."""
    tokens = list(ids)
    for _ in range(count):
        tokens.append(int(np.argmax(reference_logits(tokens))))
    return tokens[len(ids) :]
