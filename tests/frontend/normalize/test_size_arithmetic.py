"""Numbers and equality of expressions in symbolic sizes."""

from __future__ import annotations

import pytest
import tvm

from rotquant_tvm.frontend.normalize.size_arithmetic import UnknownSize, number, same_size, size_vars, substitute


def test_numbers_of_expressions():
    n, m = (tvm.tirx.Var(name, "int64") for name in "nm")
    sizes = {n: 7, m: 3}
    cases = [(n + m, 10), (n - m, 4), (n * 2 + 1, 15), (n // m, 2), (n % m, 1), (tvm.tirx.min(n, m), 3), (5, 5)]
    cases.append((tvm.tirx.if_then_else(n < m, n, m * 2), 6))
    for size, wanted in cases:
        assert number(size, sizes) == wanted
    with pytest.raises(UnknownSize, match="m"):
        number(n + m, {n: 7})


def test_equality_is_of_meaning():
    n, m = (tvm.tirx.Var(name, "int64") for name in "nm")
    assert same_size(n + m, m + n) and same_size(4, 4) and same_size(n * 2, n + n)
    assert not same_size(n, m) and not same_size(n, 1) and not same_size(3, 4)
    assert {var.name for var in size_vars([n + 1, m])} == {"n", "m"}
    assert same_size(substitute(n + m, {m: 2}), n + 2)
