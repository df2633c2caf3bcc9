"""VectorKVKernels: on CPUs, kernels laid out by hand take the place of their definitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tvm
from tvm import tirx
from tvm.target import Target

from rotquant_tvm.ops.rotate import RotationShape
from rotquant_tvm.ops.score import ScoreShape
from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape

from .attention_decode_llvm import attention_decode_llvm
from .attention_prefill_llvm import attention_prefill_llvm
from .knobs import chosen_knobs, keep_choice
from .rotate_llvm import rotate_llvm
from .score_llvm import score_llvm

HAND_LAID_ATTR = "rotquant.hand_laid"
"""Function attribute of such a kernel: the name of what laid it out."""

ATTENTION: dict[str, Callable[[SiteShape, Target], tirx.PrimFunc]] = {
    "attention_decode": attention_decode_llvm,
    "attention_prefill": attention_prefill_llvm,
}

RULES: dict[str, Callable[..., Any]] = {**ATTENTION, "rotate": rotate_llvm, "score": score_llvm}
"""What lays out the kernels, by the name of the operator (``OP_ATTR``)."""


@tvm.transform.module_pass(opt_level=0, name="VectorKVKernels")
class VectorKVKernels:
    """Replace attention, rotate and score definitions, which carry their shapes, by vector kernels like them."""

    def __init__(self, target: Target | None = None) -> None:
        """Set the llvm target; None means the one that is current when the pass runs."""
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``mod``."""
        target = self.target or Target.current(allow_none=False)
        result = tvm.IRModule(mod.functions, attrs=mod.attrs)
        for gvar, func in mod.functions_items():
            kernel = vector_kernel(func, target) if isinstance(func, tirx.PrimFunc) else None
            if kernel is not None:
                result.update_func(gvar, kernel.without_attr("global_symbol"))
        return result


def vector_kernel(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc | None:
    """Build the kernel that does what ``func`` says it does, with the knobs that it chose; None if there is none."""
    rotation, site, score = RotationShape.of(func), SiteShape.of(func), ScoreShape.of(func)
    if rotation is not None:
        rule, kernel = rotate_llvm, rotate_llvm(rotation, target)
    elif score is not None:
        rule, kernel = score_llvm, score_llvm(score, target)
    else:
        known = site is not None and not site.rotated
        rule = ATTENTION.get(str(func.attrs[OP_ATTR])) if known else None
        kernel = rule(_as_chosen(site, func), target) if rule is not None else None
    return keep_choice(func, kernel.with_attr(HAND_LAID_ATTR, rule.__name__)) if kernel is not None else None


def _as_chosen(site: SiteShape, func: tirx.PrimFunc) -> SiteShape:
    knobs = chosen_knobs(func)
    return replace(site, splits=knobs["splits"]) if "splits" in knobs else site
