"""Several kernels of one definition in one function, which launches the one tuned for sizes nearest to its own.

What is best for one sequence may be far from it for sixteen: with knobs tuned at 1 × 8,192, sixteen sequences of 32,768
tokens took 141 µs on an H200 where the rule's own knobs take 127. A function that is compiled for any number of
sequences decides at every launch.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import tvm.tirx as tir
from tvm_ffi import structural_map

from .knobs import Knobs, with_knobs

SIZES_ATTR = "rotquant.knobs_by_size"
"""Function attribute of a definition: a JSON list of pairs (bucket, knobs); a bucket gives sizes numbers by name."""

Choice = tuple[dict[str, int], Knobs]
Expr = Any


def with_choices(func: tir.PrimFunc, choices: Sequence[Choice]) -> tir.PrimFunc:
    """The definition with knobs for several sizes; unchanged if all of them have the same."""
    if len({json.dumps(knobs, sort_keys=True) for _, knobs in choices}) < 2:
        return func
    return func.with_attr(SIZES_ATTR, json.dumps([[dict(bucket), dict(knobs)] for bucket, knobs in choices]))


def choices_of(func: tir.PrimFunc) -> list[Choice]:
    """What ``with_choices`` has set; empty where nothing is set."""
    text = func.attrs.get(SIZES_ATTR) if func.attrs is not None else None
    return [] if text is None else [(bucket, knobs) for bucket, knobs in json.loads(str(text))]


def kernel_by_size(
    func: tir.PrimFunc, choices: Sequence[Choice], build: Callable[[tir.PrimFunc], tir.PrimFunc | None]
) -> tir.PrimFunc | None:
    """``build``'s kernels for all choices of knobs in one function; None if it has none for any.

    The kernels' parameters must be alike, as those of one rule are. Buckets must name sizes of the parameters.
    """
    buckets: dict[str, list[dict[str, int]]] = {}
    for bucket, knobs in choices:
        buckets.setdefault(json.dumps(knobs, sort_keys=True), []).append(bucket)
    definition = func.without_attr(SIZES_ATTR)
    built = [(build(with_knobs(definition, json.loads(knobs))), nearest) for knobs, nearest in buckets.items()]
    kernels = [(kernel, nearest) for kernel, nearest in built if kernel is not None]
    if not kernels:
        return None
    first = kernels[0][0]
    sizes = {size.name: size for param in first.params for size in param.shape if isinstance(size, tir.Var)}
    parts = [_scratch_apart(_renamed(kernel, first)) for kernel, _ in kernels]
    far = [_distance(nearest, sizes) for _, nearest in kernels]
    body = parts[-1][1]
    for number in range(len(parts) - 2, -1, -1):
        body = tir.IfThenElse(far[number] <= _least(far[number + 1 :]), parts[number][1], body)
    scratch = [statement for allocations, _ in parts for statement in allocations]
    return first.with_body(tir.SeqStmt([*scratch, body]) if scratch else body)


def _scratch_apart(body: Any) -> tuple[list[Any], Any]:
    """The global arrays that a kernel allocates before anything else, where passes look for them, and what follows."""
    statements = list(body.seq) if isinstance(body, tir.SeqStmt) else [body]
    scratch = [each for each in statements if isinstance(each, tir.AllocBuffer) and each.buffer.scope() == "global"]
    rest = [each for each in statements if not any(each is one for one in scratch)]
    return scratch, rest[0] if len(rest) == 1 else tir.SeqStmt(rest)


def _least(values: Sequence[Expr]) -> Expr:
    return reduce(tir.min, values)


def _distance(buckets: Sequence[Mapping[str, int]], sizes: Mapping[str, Expr]) -> Expr:
    """How far sizes are from the nearest of some buckets: the product of how many times they are larger or smaller."""
    # The blocks of a cache with centres say no more than its tiles do.
    sizes = {name: size for name, size in sizes.items() if name != "blocks"}
    return _least(
        [
            reduce(operator.mul, [_times(sizes[name], bucket[name]) for name in bucket if name in sizes])
            for bucket in buckets
        ]
    )


def _times(size: Expr, number: int) -> Expr:
    wanted = tir.const(number, "int64")
    large, small = tir.max(size, wanted), tir.max(tir.min(size, wanted), tir.const(1, "int64"))
    return large.astype("float64") / small.astype("float64")


def _renamed(kernel: tir.PrimFunc, first: tir.PrimFunc) -> Any:
    """A kernel's body over another kernel's parameters and their sizes."""
    if kernel is first:
        return kernel.body
    replaced: dict[tir.Var, tir.Var] = {}
    for mine, other in zip(kernel.params, first.params, strict=True):
        replaced[mine] = other
        replaced |= {x: y for x, y in zip(mine.shape, other.shape, strict=True) if isinstance(x, tir.Var)}
    return structural_map(kernel.body, (tir.Var, lambda var: replaced.get(var, var)))
