"""Instructions on bytes against NumPy, on every kind of CPU that has them."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm.tirx as tir
from rotquant_tvm.schedules.byte_ops_llvm import (
    as_words,
    byte_dot,
    has_byte_dot,
    has_byte_permutes,
    look_up_bytes,
    pick_bytes,
)
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from .byte_targets import BYTE_CPUS, byte_target

TABLES = [range(16), (7, 255, 0, 128, 1, 2, 3, 4), (200, 3), (9, 8, 7, 6)]


def run(target, function, *arrays):
    """``function`` of the vectors in ``arrays``, one of 64 bytes each, as uint8 [64]."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("kernel")
        T.func_attr({"global_symbol": "kernel", "tirx.noalias": True, "tirx.is_scheduled": True})
        at = tir.Ramp(0, 1, 16)
        buffers = [T.arg(f"a{n}", T.buffer((16,), "uint32")) for n in range(len(arrays))]
        out = T.arg("out", T.buffer((16,), "uint32"))
        T.buffer_store(out, function(*(buffer[at] for buffer in buffers)), [at])
    kernel = tvm.compile(tvm.IRModule({"kernel": builder.get()}), target)["kernel"]
    result = tvm.runtime.tensor(np.zeros(16, np.uint32))
    kernel(*(tvm.runtime.tensor(array.view(np.uint32)) for array in arrays), result)
    return result.numpy().view(np.uint8)


@pytest.mark.parametrize("kind", BYTE_CPUS)
def test_dot_products_of_unsigned_and_signed_bytes(kind):
    rng = np.random.default_rng(0)
    target, total = byte_target(kind), rng.integers(-1000, 1000, 16, dtype=np.int32)
    values, weights = rng.integers(0, 256, 64, dtype=np.uint8), rng.integers(-128, 128, 64, dtype=np.int8)
    values[:8], weights[:8] = 255, [-128] * 4 + [127] * 4  # pairs of products beyond int16 are not clipped

    def dot(start, a, b):
        return tir.reinterpret("uint32x16", byte_dot(tir.reinterpret("int32x16", start), a, b, target))

    expected = total + (values.astype(np.int32) * weights).reshape(16, 4).sum(1)
    np.testing.assert_array_equal(run(target, dot, total, values, weights).view(np.int32), expected)


@pytest.mark.parametrize("table", TABLES, ids=len)
@pytest.mark.parametrize("kind", BYTE_CPUS)
def test_lookups(kind, table):
    target, table = byte_target(kind), np.array(table, np.uint8)
    codes = np.random.default_rng(1).integers(0, 256 if has_byte_permutes(target) else 16, 64, dtype=np.uint8)
    found = run(target, lambda c: look_up_bytes(c, [int(v) for v in table], target), codes)
    np.testing.assert_array_equal(found, table[codes % len(table)])


def test_picked_bytes():
    data = np.arange(64, dtype=np.uint8)
    found = run(byte_target("halves"), lambda a: as_words(pick_bytes(a, lambda k: (7 * k + 3) % 64)), data)
    np.testing.assert_array_equal(found, data[(7 * np.arange(64) + 3) % 64])


def test_which_cpus_have_what():
    names = ("x86-64", "x86-64-v3", "x86-64-v4", "cascadelake", "alderlake", "znver5")
    targets = [Target({"kind": "llvm", "mcpu": name}) for name in names]
    assert [has_byte_dot(target) for target in targets] == [False, False, False, True, True, True]
    assert [has_byte_permutes(target) for target in targets] == [False] * 5 + [True]
