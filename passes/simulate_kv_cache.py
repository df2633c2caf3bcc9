"""Simulating a KV format: a round trip of the new keys and values of every attention site, in the model as it is."""

from __future__ import annotations

import tvm
from tvm import relax

from rotquant_tvm.errors import ModelError
from rotquant_tvm.formats import Codec
from rotquant_tvm.kv_cache_config import KVCacheConfig

from .binding_copy import BindingCopy
from .find_attention import AttentionSite
from .kv_kernels import KernelLibrary, rotation_constant


class Simulation:
    """Inserts a round trip on the new keys and values of every site of "main"."""

    def __init__(self, mod: tvm.IRModule, sites: list[AttentionSite], config: KVCacheConfig) -> None:
        self.mod, self.sites, self.config = mod, sites, config

    def _wanted(self) -> dict[relax.Var, Codec]:
        """Which variables to quantize, and how; keys and values may differ in their head dimension."""
        wanted: dict[relax.Var, Codec] = {}
        for site in self.sites:
            for role, (cache, operand) in enumerate(zip((site.key, site.value), site.call.args[1:3], strict=True)):
                var = cache.new if cache is not None else operand
                where = f"attention {site.index} ({site.output.name})"
                if not isinstance(var, relax.Var):
                    raise ModelError(f"{where} cannot be simulated: its {('key', 'value')[role]} is a constant")
                if var in wanted:
                    raise ModelError(f"{where} cannot be simulated: one tensor serves as several keys or values")
                head_dim = int(operand.ty.shape[3])
                wanted[var] = self.config.codecs(site.index, len(self.sites), head_dim)[role]
        return wanted

    def module(self) -> tvm.IRModule:
        """The rewritten module."""
        rest = {g: f for g, f in self.mod.functions_items() if g.name_hint != "main"}
        builder = relax.BlockBuilder(tvm.IRModule(rest, attrs=self.mod.attrs))
        kernels = KernelLibrary(builder)
        func = self.mod["main"]
        copy = BindingCopy(builder)
        wanted = self._wanted()

        def quantized(var: relax.Var) -> None:
            codec = wanted.get(var)
            if codec is None:
                return
            source = copy.expr(var)
            constants = [rotation_constant(r) for r in (codec.rotation, codec.inverse_rotation)]
            kernel = kernels.roundtrip(codec, str(source.ty.dtype))
            copy.replace(var, builder.emit(relax.call_tir(kernel, [source, *constants], source.ty)))

        with builder.function("main", list(func.params), attrs=dict(func.attrs)):
            with builder.dataflow():
                for param in func.params:
                    quantized(param)
                for block in func.body.blocks:
                    for binding in block.bindings:
                        copy.emit(binding)
                        quantized(binding.var)
                output = builder.emit_output(copy.expr(func.body.body))
            builder.emit_func_output(output)
        result = builder.finalize()
        relax.analysis.well_formed(result)
        return result
