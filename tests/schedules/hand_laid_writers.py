"""The operator tests' kernels, but those that write a cache are the ones laid out by hand for CUDA."""

from __future__ import annotations

from typing import ClassVar

import tvm
from rotquant_tvm.schedules.append_cuda import append_kernel
from rotquant_tvm.schedules.append_plain_cuda import append_plain_kernel
from rotquant_tvm.schedules.flush_cuda import flush_kernel

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import NO_POLICY
from rotquant_tvm.codegen import compile_module
from rotquant_tvm.ops import Axes
from rotquant_tvm.ops.site_shape import SiteShape

from ..ops.conftest import Kernels


def site_shape(operator, arguments) -> SiteShape:
    """The shape that the passes attach to the definition ``operator(*arguments)``."""
    if operator is ops.append_plain:
        kv_heads, head_dim, _, dtype, policy = arguments
        names = ("f16", "f16")
    else:
        codec_k, codec_v, kv_heads, dtype, *rest = arguments
        names, head_dim = (codec_k.format.name, codec_v.format.name), codec_k.head_dim
        policy = rest[0] if rest else NO_POLICY
    return SiteShape(*names, kv_heads, kv_heads, head_dim, 1.0, None, dtype, policy=policy.name)


class HandLaidWriters(Kernels):
    """Kernels for a CUDA target.

    ``laid_out`` collects the operators whose definition was replaced; ``knobs`` is chosen for all of them.
    """

    WRITERS: ClassVar = {ops.append: append_kernel, ops.flush: flush_kernel, ops.append_plain: append_plain_kernel}

    def __init__(self, **knobs: int) -> None:
        super().__init__("cuda")
        self.laid_out = set()
        self.knobs = knobs

    def build(self, operator, *arguments, **options):
        """The compiled function of ``operator(*arguments, **options)``."""
        key = (operator, arguments, tuple(sorted(options.items())))
        if key not in self._compiled:
            kernel = None
            if operator in self.WRITERS:
                words = (arguments[2],) if operator is ops.append_plain else ()
                shape = site_shape(operator, arguments)
                kernel = self.WRITERS[operator](shape, self.target, *words, **self.knobs)
            if kernel is not None:
                self.laid_out.add(operator)
            else:
                kernel = operator(*arguments, axes=Axes.of(self.target), **options)
            self._compiled[key] = self.compile(kernel)
        return self._compiled[key]

    def compile(self, func):
        """The compiled form of a kernel."""
        mod = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
        return compile_module(mod, self.target)["kernel"]
