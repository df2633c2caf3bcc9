"""The trellis tables of decode attention: every window's values in every copy, on the simulated GPU."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.trellis_tables_cuda import (
    ADDRESS_BITS,
    GRID_WORDS,
    LANE_BITS,
    TABLE_WORDS,
    TrellisTables,
    is_trellis,
)
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import KVFormat
from rotquant_tvm.formats.trellis import TRELLIS_BITS

from .simulated_decode import DecodeGPU


def filled(codecs, threads):
    """The words of shared memory, uint32, after one block has filled its tables."""
    size = TrellisTables.words(codecs)
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("kernel")
        out = T.arg("out", T.buffer((size,), "uint32"))
        with T.launch_thread("blockIdx.x", 1), T.launch_thread("threadIdx.x", threads) as thread:
            shared = T.alloc_buffer((size,), "uint32", scope="shared.dyn")
            TrellisTables(codecs, shared, 0).fill(thread, threads)
            with T.serial(0, -(-size // threads)) as turn:
                at = turn * threads + thread
                with T.If(at < size), T.Then():
                    T.buffer_store(out, shared[at], [at])
    out = np.zeros(size, np.uint32)
    DecodeGPU(builder.get())(out)
    return out


def codec_of(name):
    return KVFormat.parse(name).codec(64)


@pytest.mark.parametrize("threads", [96, 256])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_every_window_has_its_values_in_every_copy(bits, threads):
    codec = codec_of(f"planar{bits}+tcq")
    pairs = filled([codec], threads)[:TABLE_WORDS].view(np.int8).reshape(-1, 2)
    address = 2 * np.arange(len(pairs)) - 2 * TABLE_WORDS
    window = sum((address >> source & 1) << target for target, source in enumerate(ADDRESS_BITS[bits]))
    expected = np.stack([codec.codebook.grid[window >> bits & 255], codec.codebook.grid[window & 255]], -1)
    np.testing.assert_array_equal(pairs, expected)


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_an_address_is_a_window_and_a_lane(bits):
    """All bits but the lowest (values have 16 bits); lanes with copies of their own are on banks of their own."""
    assert sorted(ADDRESS_BITS[bits] + LANE_BITS[bits]) == list(range(1, 16))
    assert len(ADDRESS_BITS[bits]) == 8 + bits
    assert set(LANE_BITS[bits]) <= {2, 3, 4, 5, 6}


def test_formats_of_the_same_bits_share_a_table():
    two, other, three, plain = map(codec_of, ("planar2+tcq", "iso2+tcq", "iso3+tcq", "iso3"))
    assert [is_trellis(codec) for codec in (two, three, plain)] == [True, True, False]
    size = TABLE_WORDS + GRID_WORDS
    assert [TrellisTables.words(pair) for pair in ((two, other), (two, three), (plain, three), (plain, plain))] == [
        size,
        2 * size,
        size,
        0,
    ]
    both = filled((two, three), 128)
    np.testing.assert_array_equal(both[:TABLE_WORDS], filled((two,), 128)[:TABLE_WORDS])
    np.testing.assert_array_equal(both[size : size + TABLE_WORDS], filled((three,), 128)[:TABLE_WORDS])
