"""TokenColumns: which columns of a padded batch are stored, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm.errors import UsageError
from rotquant_tvm.integrations.token_columns import TokenColumns


def mask_of(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(letter) for letter in row] for row in rows])


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4), st.integers(1, 6))
def test_real_columns_come_first_and_in_order(rows, first):
    mask = torch.tensor(rows)
    columns, new = TokenColumns(len(rows)).extended(first, mask[:, :first])
    more, later = columns.extended(7 - first, mask)
    for part, found in ((mask[:, :first], new), (mask[:, first:], later)):
        numbers = torch.arange(part.shape[1]).repeat(len(rows), 1)
        packed = found.packed(numbers, 1)
        assert found.lengths.tolist() == part.sum(1).tolist() and found.whole == bool(part.all())
        for row, real, count in zip(packed, part, found.lengths, strict=True):
            assert row[:count].tolist() == real.nonzero().flatten().tolist()
        assert torch.equal(found.unpacked(packed, 1), numbers)
    assert more.count == 7 and more.lengths.tolist() == mask.sum(1).tolist()
    starts = [[b and not a for a, b in zip([False, *row], row, strict=False)] for row in rows]
    assert more.gaps == any(sum(row) > 1 for row in starts)


def test_other_axes_are_permuted_alike():
    _, new = TokenColumns(2).extended(3, mask_of("011", "101"))
    x = torch.randn(2, 4, 3, 5)
    packed = new.packed(x, 2)
    assert torch.equal(packed[0, :, :2], x[0, :, 1:]) and torch.equal(packed[1, :, 1], x[1, :, 2])
    assert torch.equal(new.unpacked(packed, 2), x)
    assert torch.equal(new.unpacked(new.packed(x.transpose(1, 2), 1), 1), x.transpose(1, 2))


def test_without_padding_there_is_no_order_and_no_record():
    columns, new = TokenColumns(2).extended(3, None)
    assert new.whole and new.order is None and new.lengths.tolist() == [3, 3] and columns.real is None
    assert columns.extended(2, torch.ones(2, 9, dtype=torch.bool))[0].real is None


def test_select_and_crop():
    columns, _ = TokenColumns(2).extended(4, mask_of("0111", "1110"))
    assert columns.select([1, 0, 1]).lengths.tolist() == [3, 3, 3]
    assert columns.cropped(3).lengths.tolist() == [2, 3]
    assert columns.same(columns.select([0, 1])) and not columns.same(columns.cropped(3))
    assert not columns.same(columns.select([1, 0])) and not columns.same(TokenColumns(2, 4))
    assert TokenColumns(2, 3, np.ones((2, 3), bool)).same(TokenColumns(2, 3))


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (None, "give an attention_mask for all tokens"),
        (mask_of("01111"), "need"),
        (mask_of("0111", "1111"), "past's columns included"),
        (torch.ones(2, 1, 1, 5), "need"),
        (mask_of("11111", "11111"), "changed for tokens"),
        (mask_of("00111", "11111"), "changed for tokens"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, said):
    columns, _ = TokenColumns(2).extended(4, mask_of("0111", "1111"))
    with pytest.raises(UsageError, match=said):
        columns.extended(1, mask)
