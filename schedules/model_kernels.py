"""The rules for a model's own work, by operator (``MODEL_OP_ATTR``) and kind of target.

The passes put such kernels into a module themselves, laid out by the rule's own knobs; where a tuning record has other
ones, the rule builds the kernel anew.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.target import Target

from rotquant_tvm.ops.linear import LINEAR
from rotquant_tvm.ops.model_op import model_op
from rotquant_tvm.ops.rms_norm import RMS_NORM

from .knobs import keep_choice
from .linear_rule_cuda import linear_rule_cuda
from .linear_rule_llvm import linear_rule_llvm
from .loops_llvm import loops_llvm
from .rms_norm_cuda import rms_norm_cuda

LOOPS = "loops"
"""The operator of functions that TVM made: whatever loops they are."""

MODEL_RULES: dict[tuple[str, str], Callable[[tirx.PrimFunc, Target], tirx.PrimFunc | None]] = {
    (LINEAR, "cuda"): linear_rule_cuda,
    (LINEAR, "llvm"): linear_rule_llvm,
    (RMS_NORM, "cuda"): rms_norm_cuda,
    (LOOPS, "llvm"): loops_llvm,
}


def model_kernel(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc | None:
    """Build the kernel that does what a function says it does, with the knobs that it chose; None if there is none."""
    rule = MODEL_RULES.get((str(model_op(func)), target.kind.name))
    kernel = rule(func, target) if rule is not None else None
    if kernel is None:
        return None
    symbol = func.attrs.get("global_symbol")
    kernel = kernel.without_attr("global_symbol") if "global_symbol" in kernel.attrs else kernel
    if symbol is not None:
        kernel = kernel.with_attr("global_symbol", symbol)
    return keep_choice(func, kernel)
