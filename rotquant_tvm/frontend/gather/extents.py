"""Extents of axes as polynomials of the symbolic sizes, so that products can be compared and divided exactly.

Reshapes merge axes and split them again: ``b*8`` over ``b`` is 8, and ``(past + 1)*4`` over 4 is ``1 + past`` in
whichever way either was written. Polynomials with integer coefficients have one form each and exact division.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import reduce
from operator import add, mul

import tvm
from tvm import tirx

Monomial = tuple[int, ...]  # the symbols of a product, by number, sorted


def _order(monomial: Monomial) -> tuple[int, tuple[int, ...]]:
    """Higher degree first, then the lower symbols: an order that products keep."""
    return -len(monomial), monomial


@dataclass(frozen=True)
class Extent:
    """A polynomial: pairs (monomial, coefficient), the coefficients not 0."""

    terms: frozenset[tuple[Monomial, int]]

    @staticmethod
    def of(terms: dict[Monomial, int]) -> Extent:
        """The polynomial of these terms; those of coefficient 0 vanish."""
        return Extent(frozenset((monomial, factor) for monomial, factor in terms.items() if factor))

    @property
    def constant(self) -> int | None:
        """Its value if it has no symbol."""
        terms = dict(self.terms)
        return terms.get((), 0) if not terms or terms.keys() == {()} else None

    @property
    def is_one(self) -> bool:
        """Whether it is the number 1."""
        return self.constant == 1

    def __add__(self, other: Extent) -> Extent:
        total = Counter(dict(self.terms))
        for monomial, factor in other.terms:
            total[monomial] += factor
        return Extent.of(total)

    def __mul__(self, other: Extent) -> Extent:
        total: Counter[Monomial] = Counter()
        for left, left_factor in self.terms:
            for right, right_factor in other.terms:
                total[tuple(sorted(left + right))] += left_factor * right_factor
        return Extent.of(total)

    def over(self, other: Extent) -> Extent | None:
        """Return the exact quotient, or None if there is none."""
        rest, quotient = self, Extent.of({})
        divisor, divisor_factor = min(other.terms, key=lambda term: _order(term[0]), default=((), 0))
        while rest.terms:
            monomial, factor = min(rest.terms, key=lambda term: _order(term[0]))
            if not divisor_factor or factor % divisor_factor or Counter(divisor) - Counter(monomial):
                return None
            left = tuple(sorted((Counter(monomial) - Counter(divisor)).elements()))
            step = Extent.of({left: factor // divisor_factor})
            quotient = quotient + step
            rest = rest + step * other * Extent.of({(): -1})
        return quotient


ONE = Extent.of({(): 1})


def product(extents: list[Extent]) -> Extent:
    """Multiply extents; 1 for none."""
    return reduce(mul, extents, ONE)


class ExtentTable:
    """Numbers the symbols of one function's sizes and translates between sizes and extents."""

    def __init__(self) -> None:
        self._symbols: list[tirx.PrimExpr] = []
        self._analyzer = tvm.sym.Analyzer()

    def extent(self, size: tirx.PrimExpr | int) -> Extent:
        """Return the polynomial of a size; what is neither a sum nor a product counts as a symbol."""
        if isinstance(size, int | tirx.IntImm):
            return Extent.of({(): int(size)})
        if isinstance(size, tirx.Add):
            return self.extent(size.a) + self.extent(size.b)
        if isinstance(size, tirx.Sub):
            return self.extent(size.a) + self.extent(size.b) * Extent.of({(): -1})
        if isinstance(size, tirx.Mul):
            return self.extent(size.a) * self.extent(size.b)
        for number, symbol in enumerate(self._symbols):
            if symbol.same_as(size) or self._analyzer.can_prove_equal(symbol, size):
                return Extent.of({(number,): 1})
        self._symbols.append(size)
        return Extent.of({(len(self._symbols) - 1,): 1})

    def size(self, extent: Extent) -> tirx.PrimExpr:
        """Return an extent as the size of an axis."""
        terms = sorted(extent.terms, key=lambda term: _order(term[0]))
        products = [
            reduce(mul, [self._symbols[number] for number in monomial], tirx.IntImm("int64", factor))
            for monomial, factor in terms
        ]
        return self._analyzer.simplify(reduce(add, products, tirx.IntImm("int64", 0)))
