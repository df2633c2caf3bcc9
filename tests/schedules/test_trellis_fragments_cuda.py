"""Trellis codes of a tile as operands of the tensor cores: every element at its place, on the simulated GPU."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.code_fragments_cuda import load_code_words, words_per_lane
from rotquant_tvm.schedules.cuda_ops import Registers, block_sync, scalar
from rotquant_tvm.schedules.trellis_fragments_cuda import TrellisKeys, TrellisValues
from rotquant_tvm.schedules.trellis_tables_cuda import TrellisTables
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS, KVFormat
from rotquant_tvm.formats.packing import pack_codes
from rotquant_tvm.formats.trellis import TRELLIS_BITS, states

from ..sampling import sampled
from .simulated_decode import DecodeGPU

THREADS = 64
CASES = [(bits, head_dim) for bits in TRELLIS_BITS for head_dim in (32, 48, 64, 80, 96, 112, 128, 208, 256)]
ORDINARY = [(2, 64), (2, 80), (3, 32), (3, 80), (3, 128), (4, 48), (4, 128)]


def fragments_kernel(codec, role):
    """``kernel(section, out)``: uint32 [words] -> uint32 [halves, 32 lanes], all threads fill the table."""
    bits, head_dim = codec.format.bits, codec.head_dim
    size, halves = head_dim * bits, head_dim // 4
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("kernel")
        section, out = T.arg("section", T.buffer((size,), "uint32")), T.arg("out", T.buffer((halves, 32), "uint32"))
        with T.launch_thread("blockIdx.x", 1), T.launch_thread("threadIdx.x", THREADS) as thread:
            shared = T.alloc_buffer((size + TrellisTables.words([codec]),), "uint32", scope="shared.dyn")
            with T.serial(0, -(-size // THREADS)) as turn:
                at = turn * THREADS + thread
                with T.If(at < size), T.Then():
                    T.buffer_store(shared, section[at], [at])
            tables = TrellisTables([codec], shared, size)
            tables.fill(thread, THREADS)
            block_sync()
            lane, words = scalar(thread % 32), Registers(words_per_lane(bits, head_dim))
            with T.If(thread < 32), T.Then():
                load_code_words(words, shared, 0, lane, bits, head_dim)
                fragments = (TrellisKeys, TrellisValues)["kv".index(role)](codec, tables, lane).fragments(words)
                for half in range(halves):
                    T.buffer_store(out, fragments.half(half), [half, lane])
    return builder.get()


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("case", sampled(CASES, ORDINARY), ids=str)
def test_every_element_has_its_value(case, role):
    bits, head_dim = case
    rng = np.random.default_rng(bits * head_dim)
    codec = KVFormat.parse(f"planar{bits}+tcq").codec(head_dim)
    codes = rng.integers(0, 2**bits, (TOKENS, head_dim), dtype=np.uint8)
    out = np.zeros((head_dim // 4, 32), np.uint32)
    DecodeGPU(fragments_kernel(codec, role))(pack_codes(codes, role, bits).view(np.uint32), out)
    expected = codec.codebook.grid[states(codes, bits)]
    half, lane, e = np.indices((head_dim // 4, 32, 4))
    g, t = np.divmod(lane, 4)
    if role == "k":
        octet, block = np.divmod(half, head_dim // 16)
        places = 8 * octet + g, 16 * block + 4 * t + e
    else:
        j, x, row = half // 4, half // 2 % 2, half % 2
        places = 16 * x + 8 * (e // 2) + 2 * t + e % 2, TrellisValues.place(lane, j, row)
    np.testing.assert_array_equal(out.view(np.int8).reshape(half.shape), expected[places])
