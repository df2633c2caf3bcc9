"""The rule for linear layers on CUDA: which of ``linear_cuda``'s kernels there are, as knobs.

One function serves few rows (decode) and many (prefill), so a size decides only the knobs of the kernel that it runs:
``knobs_at``. Records of both sizes are taken together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tvm import tirx
from tvm.target import Target

from rotquant_tvm.ops.linear import LinearShape
from rotquant_tvm.ops.model_op import model_properties

from .cuda_target import dynamic_shared_memory
from .knobs import chosen_knobs
from .linear_cuda import FEW, CUDALinear, cuda_linear, many_rows
from .linear_few_rows_cuda import FewRows
from .linear_many_rows_cuda import ManyRows
from .linear_warpgroups_cuda import has_warpgroups

KNOBS: dict[str, tuple[int, ...]] = {
    "few_tiles": (1, 2),
    "few_warps": (4, 8, 16),
    "few_steps": (1, 2, 4),
    "few_stages": (2, 3, 4),
    "warpgroups": (0, 1),
    "largest": (0, 1, 2),
    "stages": (3, 4),
}
"""``few_…``: of the kernel for up to 8 rows. ``warpgroups``: Hopper's tensor cores; ``largest``: how many of the
largest tiles for many rows are left out; ``stages`` of their rings."""


def knobs_at(bucket: Mapping[str, int]) -> tuple[str, ...]:
    """The knobs that matter for so many rows."""
    rows = 1
    for size in bucket.values():
        rows *= size
    few = tuple(name for name in KNOBS if name.startswith("few_"))
    if rows <= FEW[0].columns:
        return few
    return () if rows <= FEW[-1].columns else tuple(name for name in KNOBS if name not in few)


def linear_shape(spec: CUDALinear) -> LinearShape:
    """What a kernel of ``cuda_linear`` says of itself."""
    kept = (spec.in_features, spec.out_features, spec.bias, spec.residual, spec.gated, spec.leading)
    return LinearShape(*kept, "float16", "float16", spec.output_dtype)


def linear_rule_cuda(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc | None:
    """Build the kernel with the knobs that a definition chose; None if it does not fit the GPU."""
    shape, chosen = LinearShape.read(model_properties(func)), chosen_knobs(func)
    kept = (shape.in_features, shape.out_features, shape.bias, shape.residual, shape.gated, shape.leading)
    spec = CUDALinear(*kept, shape.output_dtype)
    few, many, limit = _few(chosen), _many(chosen, target), dynamic_shared_memory(target)
    if chosen.get("warpgroups") and not has_warpgroups(target):
        return None
    # What does not fit would be left out, and the kernel another one than a record says.
    if any(name.startswith("few_") for name in chosen) and few[0].shared_bytes(spec.in_features) > limit:
        return None
    if any(name in chosen for name in ("largest", "stages")) and many[0].shared_bytes > limit:
        return None
    return cuda_linear(spec, target, few, many).with_attrs(shape.attrs())


def _few(chosen: Mapping[str, int]) -> tuple[FewRows, ...]:
    named = {name.removeprefix("few_"): value for name, value in chosen.items() if name.startswith("few_")}
    return replace(FEW[0], **named), *FEW[1:]


def _many(chosen: Mapping[str, int], target: Target) -> tuple[ManyRows, ...]:
    tiles = many_rows(bool(chosen.get("warpgroups", has_warpgroups(target))))[chosen.get("largest", 0) :]
    return tuple(replace(each, stages=chosen.get("stages", each.stages)) for each in tiles)
