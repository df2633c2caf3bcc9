"""Extents: one form for equal sizes, exact division, and back to sizes."""

import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import tirx

from rotquant_tvm.frontend.gather.extents import ExtentTable, product

N, M, K = (tirx.Var(name, "int64") for name in "nmk")
SIZES = [1, 3, 4, N, M, N + 1, 1 + N, M * 2 + N, N * M + 3, tirx.floordiv(K, 4)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (N + 1, 1 + N),
        ((N + 1) * 4, N * 4 + 4),
        (N * M, M * N),
        (N + M - M, N),
        (tirx.floordiv(N, 2), tirx.floordiv(N, 2)),
    ],
)
def test_equal_sizes_have_one_form(one, other):
    table = ExtentTable()
    assert table.extent(one) == table.extent(other)


@pytest.mark.parametrize(
    ("one", "other"), [(N, M), (N + 1, N), (N * 2, N * 3), (tirx.floordiv(N, 2), tirx.floordiv(N, 3))]
)
def test_other_sizes_differ(one, other):
    table = ExtentTable()
    assert table.extent(one) != table.extent(other)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SIZES), max_size=3), st.sampled_from(SIZES))
def test_division_undoes_multiplication(factors, divisor):
    table = ExtentTable()
    rest = product([table.extent(size) for size in factors])
    assert (rest * table.extent(divisor)).over(table.extent(divisor)) == rest


@pytest.mark.parametrize(("size", "divisor"), [(N, M), (N + 1, N), (7, 2), (N, 2), (N * N, N + 1), (N, 0)])
def test_there_is_no_quotient(size, divisor):
    table = ExtentTable()
    assert table.extent(size).over(table.extent(divisor)) is None


@pytest.mark.parametrize("size", SIZES)
def test_back_to_sizes(size):
    table = ExtentTable()
    assert tvm.sym.Analyzer().can_prove_equal(table.size(table.extent(size)), size)


def test_numbers():
    table = ExtentTable()
    assert table.extent(tirx.IntImm("int64", 6)).constant == 6
    assert table.extent(N - N).constant == 0
    assert table.extent(N).constant is None
    assert table.extent(N + 1 - N).is_one
