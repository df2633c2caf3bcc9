"""The operators of one attention, defined as the compiler's passes define them and compiled one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm import relax

from rotquant_tvm.codegen import compile_kernel
from rotquant_tvm.formats import Codec, Rotation
from rotquant_tvm.ops.site_shape import SiteShape
from rotquant_tvm.passes.kv_kernels import KernelLibrary
from rotquant_tvm.passes.lower_kv_ops import SPLITS
from rotquant_tvm.schedules.gpu_kv_kernels import gpu_kernel
from rotquant_tvm.schedules.vector_kv_kernels import HAND_LAID_ATTR, vector_kernel

DEFINITION = "definition"
"""What stands for a kernel's name where no rule had one."""


@dataclass(frozen=True)
class Operator:
    """A compiled operator: ``run`` takes the definition's arguments; ``rule`` names the hand-laid kernel."""

    run: Callable[..., None]
    rule: str


class OperatorLibrary:
    """Builds and compiles operators for ``target``, each once; definitions come from the passes' ``KernelLibrary``."""

    def __init__(self, target: tvm.target.Target) -> None:
        self._target = target
        self._builder = relax.BlockBuilder()
        self._definitions = KernelLibrary(self._builder, target)
        self._compiled: dict[str, Operator] = {}

    def rotate(self, rotation: Rotation, dtype: str) -> Operator | None:
        """``ops.rotate``; None for the identity, which the passes leave out."""
        if rotation.identity:
            return None
        return self._operator(self._definitions.rotate(rotation.structure, rotation.head_dim, dtype))

    def attention(self, shape: SiteShape) -> Operator:
        """Decode or prefill attention over packed tiles, in as many splits as the passes choose."""
        splits = max(1, SPLITS[self._target.kind.name] // shape.kv_heads)
        return self._operator(self._definitions.attention_packed(shape, splits))

    def roundtrip(self, codec: Codec, dtype: str) -> Operator:
        """``ops.roundtrip``."""
        return self._operator(self._definitions.roundtrip(codec, dtype))

    def append(self, shape: SiteShape) -> Operator:
        """``ops.append``."""
        return self._operator(self._definitions.append(shape))

    def flush(self, shape: SiteShape, ordered: bool) -> Operator:
        """``ops.flush``."""
        return self._operator(self._definitions.flush(shape, ordered))

    def append_plain(self, shape: SiteShape) -> Operator:
        """``ops.append_plain``."""
        return self._operator(self._definitions.append_plain(shape))

    def _operator(self, gvar: tvm.ir.GlobalVar) -> Operator:
        name = gvar.name_hint
        if name not in self._compiled:
            func = self._builder.get()[gvar]
            run = compile_kernel(func, self._target, aligned=True)
            self._compiled[name] = Operator(run, kernel_rule(func, self._target))
        return self._compiled[name]


def kernel_rule(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> str:
    """Name the hand-laid kernel that takes a definition's place on a target, ``"definition"`` if there is none."""
    find = gpu_kernel if target.kind.name == "cuda" else vector_kernel
    kernel = find(func, target)
    return DEFINITION if kernel is None else str(kernel.attrs[HAND_LAID_ATTR])
