"""Layouts are told by tags, and brought into the canonical order."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from tvm import relax

from rotquant_tvm.frontend.normalize.token_layout import TokenLayout, possible_layouts

from .numpy_step import run

SIZES = (2, 3, 4, 5)


def _wanted():
    return np.arange(np.prod(SIZES)).reshape(SIZES)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_every_order_is_found_and_undone(order):
    tokens = np.transpose(_wanted(), order).astype("float32")
    assert possible_layouts(tokens, _wanted()) == [TokenLayout(order)]
    x = relax.Var("x", relax.TensorType(tokens.shape, "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(TokenLayout(order).canonical(builder, x, SIZES))
        builder.emit_func_output(result)
    (canonical,) = run(builder.get()["main"], [tokens])
    np.testing.assert_array_equal(canonical, _wanted().transpose(0, 2, 1, 3))


def test_merged_axes_and_parts():
    merged = _wanted().transpose(0, 2, 1, 3).reshape(8, 3, 5)
    assert possible_layouts(merged, _wanted()) == [TokenLayout((0, 2, 1, 3))]
    packed = np.stack([merged + 1000, merged], axis=1)
    assert possible_layouts(packed, _wanted()) == [TokenLayout((0, 2, 1, 3), (1, 1))]


def test_an_axis_of_one_fits_more_than_one_order():
    tags = np.arange(30).reshape(2, 3, 1, 5)
    found = possible_layouts(tags, tags)
    assert TokenLayout((0, 1, 2, 3)) in found and TokenLayout((0, 2, 1, 3)) in found
    assert TokenLayout((1, 0, 2, 3)) not in found


def test_other_tokens_fit_no_layout():
    wrong = _wanted()[:, ::-1]
    assert possible_layouts(wrong, _wanted()) == []
