"""Indices made of constants are folded, what depends on an input or a dynamic size is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.folded_numbers import MAX_ELEMENTS, with_folded_numbers
from rotquant_tvm.frontend.torch_importer import to_relax
from rotquant_tvm.frontend.torch_program_converters import PROGRAM_CONVERTERS

from .program_runner import run

SEQ = tvm.tirx.Var("seq", "int64")


def _heads(emit, x):
    return emit(R.repeat(emit(R.arange(0, 2, 1, "int64")), 3, 0))


def _turned(emit, x):
    return emit(R.subtract(relax.const(1, "int64"), _heads(emit, x)))


def _of_input(emit, x):
    return emit(R.astype(emit(R.take(emit(R.reshape(x, [-1])), relax.const([0, 1], "int64"), axis=0)), "int64"))


def _of_size(emit, x):
    return emit(R.strided_slice(emit(R.arange(0, SEQ, 1, "int64")), axes=[0], begin=[0], end=[2]))


def _large(emit, x):
    return emit(R.zeros([MAX_ELEMENTS + 1], "int64"))


def _module(spell, shape=(2, 2, SEQ)) -> tvm.IRModule:
    """Parts of x along its axis 1."""
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(R.take(x, spell(builder.emit, x), axis=1, mode="wrap"))
        builder.emit_func_output(result)
    return builder.get()


def _constants(mod: tvm.IRModule) -> list[np.ndarray]:
    values = relax.analysis.get_var2val(mod["main"]).values()
    return [value.value.numpy() for value in values if isinstance(value, tvm.ir.GenericConst)]


@pytest.mark.parametrize(("spell", "expected"), [(_heads, [0, 0, 0, 1, 1, 1]), (_turned, [1, 1, 1, 0, 0, 0])])
def test_an_index_made_of_constants_becomes_one(spell, expected):
    mod = with_folded_numbers(_module(spell))
    relax.analysis.well_formed(mod)
    assert [found.tolist() for found in _constants(mod)] == [expected]
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    (out,) = run(mod["main"], [x])
    np.testing.assert_array_equal(out, x[:, expected])


@pytest.mark.parametrize("spell", [_of_input, _of_size, _large])
def test_other_indices_stay(spell):
    assert _constants(with_folded_numbers(_module(spell))) == []


def test_rows_of_a_table_stay():
    """They may be of a mask, whose lengths must stay visible."""
    assert _constants(with_folded_numbers(_module(_heads, (2, 2)))) == []


def test_repeat_interleave_without_an_axis():
    """Of a tensor: all elements in a row; of heads' numbers: an index."""

    class Repeated(torch.nn.Module):
        def forward(self, x):
            return x.repeat_interleave(2), x[:, torch.arange(2).repeat_interleave(3)]

    x = torch.arange(12.0).reshape(3, 2, 2)
    program = torch.export.export(Repeated(), (x,))
    mod = with_folded_numbers(to_relax(program, PROGRAM_CONVERTERS, "program"))
    assert [found.tolist() for found in _constants(mod)] == [[0, 0, 0, 1, 1, 1]]
    for found, expected in zip(run(mod["main"], [x.numpy()]), Repeated()(x), strict=True):
        np.testing.assert_array_equal(found, expected.numpy())
