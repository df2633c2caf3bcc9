"""The sizes at which a part of a step is evaluated: around every whole number that it holds.

A rule that changes at a length written in the model (a window, the end of a table, a switch for long texts) then
changes inside a case. A rule that changes at a length which the model computes from several numbers, none of them
near it, is not seen, nor is one beyond ``LARGEST_LENGTH``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import tvm
from tvm import relax, tirx
from tvm_ffi import structural_walk

from rotquant_tvm.frontend.normalize.cases import Case, StepInputs

LARGEST_LENGTH = 1 << 20
LONGEST_CHUNK = 300
"""New tokens of an ordinary case; a mask has as many numbers as the square of it."""
LONGEST_UNCACHED = 4200
"""New tokens of a case of a model without a cache that holds a number as large."""
BASE_CASES = ((0, 1), (0, 5), (5, 1), (3, 4), (7, 3), (1, 2))


def whole_numbers(
    step: StepInputs, roots: Iterable[relax.Expr], stop: Callable[[relax.Var], bool] = lambda _: False
) -> set[int]:
    """The whole numbers that may be lengths in what the values of ``roots`` are computed from."""
    values: list[float] = []
    for var in step.view.slice(roots, stop):
        bound = step.view.value(var)
        if var in step.weights:
            values += step.weights[var].shape
        elif isinstance(bound, tvm.ir.GenericConst):
            values += _held([bound])
        elif isinstance(bound, relax.Call) and not stop(var):
            found: list[tirx.IntImm] = []
            sized = [arg for arg in bound.args if not isinstance(arg, (relax.Var, tvm.ir.GenericConst))]
            structural_walk(sized, (tirx.IntImm, found.append))
            values += [int(value) for value in found]
            values += _held([arg for arg in bound.args if isinstance(arg, tvm.ir.GenericConst)])
    usable = [abs(value) for value in values if np.isfinite(value) and value == int(value)]
    return {int(value) for value in usable if 2 <= value <= LARGEST_LENGTH}


def _held(constants: list[tvm.ir.GenericConst]) -> list[float]:
    """The sizes of constants, and the numbers in small ones."""
    arrays = [constant.value.numpy() for constant in constants]
    sizes = [float(size) for array in arrays for size in array.shape]
    return sizes + [float(x) for array in arrays if array.size <= 16 for x in array.ravel()]


def cases_around(numbers: set[int], cached: bool, capacity: int | None, padded: bool) -> list[Case]:
    """The sizes to evaluate at, small ones first, and those with padding last.

    ``cached``: the step has a past. ``capacity``: tokens that the source's own cache holds, None without a limit.
    """
    sizes = set(BASE_CASES)
    for number in numbers:
        sizes |= {(max(number - 5, 0), 5), (max(number - 2, 0), 5)}
        if number <= LARGEST_LENGTH // 16:
            sizes.add((2 * number, 3))
        if number <= LONGEST_CHUNK - 2:
            sizes |= {(0, number + 2), (1, number)}
    if not cached:  # all tokens are new ones, so windows are seen in long chunks alone
        sizes = {(0, past + seq) for past, seq in sizes if past + seq <= LONGEST_CHUNK}
        sizes |= {(0, number + 2) for number in numbers if number <= LONGEST_UNCACHED}
    if capacity is not None:
        sizes |= {(max(capacity - seq, 0), seq) for seq in (1, 3)}
        sizes = {(past, seq) for past, seq in sizes if past + seq <= capacity}
    cases = [Case(past, seq) for past, seq in sorted(sizes, key=lambda size: (sum(size), size))]
    small = [case for case in cases if 1 < case.total <= LONGEST_CHUNK]
    return cases + [Case(case.past, case.seq, side) for case in small for side in ("left", "right") if padded]
