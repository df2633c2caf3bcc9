"""The sizes of an evaluation straddle the numbers that it holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm.frontend.normalize.lengths import LONGEST_CHUNK, cases_around


@given(st.integers(2, 1 << 16))
def test_a_number_lies_inside_a_case(number):
    cases = cases_around({number}, True, None, False)
    assert any(case.past < number < case.total for case in cases)
    assert any(case.past <= number - 2 and case.total >= number + 2 for case in cases) or number < 4
    assert any(case.past == 0 for case in cases)


@given(st.integers(2, 4200))
def test_without_a_past_all_tokens_are_new(number):
    cases = cases_around({number}, False, None, True)
    assert all(case.past == 0 for case in cases)
    assert max(case.seq for case in cases) >= number + 2
    assert all(case.total <= LONGEST_CHUNK for case in cases if case.padding)


@pytest.mark.parametrize("capacity", [3, 12, 128])
def test_a_buffer_is_not_overrun(capacity):
    cases = cases_around({7, 64}, True, capacity, True)
    assert max(case.total for case in cases) == capacity
    assert {case.padding for case in cases} == {"", "left", "right"}
