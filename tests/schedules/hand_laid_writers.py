"""The operator tests' kernels, but those that write a cache are the ones laid out by hand for CUDA."""

from __future__ import annotations

import tvm
from rotquant_tvm.schedules.gpu_kv_kernels import gpu_kernel
from rotquant_tvm.schedules.knobs import with_knobs

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
    """Kernels for a CUDA target; ``laid_out`` collects the operators whose definition was replaced, ``knobs`` is chosen for all."""

    WRITERS = (ops.append, ops.flush, ops.append_plain)

    def __init__(self) -> None:
        super().__init__("cuda")
        self.laid_out = set()
        self.knobs = {}

    def build(self, operator, *arguments, **options):
        """The compiled function of ``operator(*arguments, **options)``."""
        key = (operator, arguments, tuple(sorted(options.items())))
        if key not in self._compiled:
            func = operator(*arguments, axes=Axes.of(self.target), **options)
            if operator in self.WRITERS:
                func = with_knobs(site_shape(operator, arguments).attach(func), self.knobs)
            kernel = gpu_kernel(func, self.target)
            if kernel is not None:
                self.laid_out.add(operator)
            self._compiled[key] = self.compile(func if kernel is None else kernel)
        return self._compiled[key]

    def compile(self, func):
        """The compiled form of a kernel."""
        mod = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
        return compile_module(mod, self.target)["kernel"]
