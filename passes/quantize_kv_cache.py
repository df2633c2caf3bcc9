"""QuantizeKVCache: a decoder step with past keys and values becomes prefill and decode over a packed cache.

The function "main" of a frontend is replaced by the compiled library's functions: four, and ``verify`` where logits
after every token are wanted. Growing the cache becomes an append in place; attention becomes dequantize, un-rotate
and dense attention: explicit, correct and slow, for the passes that follow (``HoistRotation``, ``LowerKVOps``) to move
and fuse.
"""

from __future__ import annotations

import json
from typing import Any

import tvm
from tvm import relax
from tvm_ffi import structural_walk

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.errors import ModelError
from rotquant_tvm.formats import VERSION as LAYOUT_VERSION
from rotquant_tvm.kv_cache_config import KVCacheConfig

from .binding_copy import BindingCopy
from .find_attention import dataflow_graph, find_attention
from .kv_kernels import KernelLibrary
from .last_logits import returns_every_logit, with_last_logits
from .layer_cache import LayerCache
from .simulate_kv_cache import Simulation
from .site_attention import SiteAttention, StepLengths
from .spell_out_attention import SpellOutAttention

INFO_VERSION = 3
KEPT_ATTR = "rotquant.kept"
"""Function attribute: JSON, by layer why its "k" or "v" stay in 16 bits (``KVCacheConfig.fitted``)."""


def cache_info(
    func: relax.Function, layers: list[LayerCache], names: list[str], every_logit: bool = False
) -> dict[str, Any]:
    """The description that ``kv_cache_info()`` returns (plain data)."""
    logits = func.ret_ty.fields[0]
    limit = func.attrs.get("rotquant.max_position")
    return {
        "version": INFO_VERSION,
        "layout_version": LAYOUT_VERSION,
        "layers": [layer.describe() for layer in layers],
        "vocab_size": int(logits.shape[-1]),
        "max_position": int(limit) if limit is not None else 2**31 - 1,
        "dtype": str(logits.dtype),
        "weights": names,
    } | ({"every_logit": True} if every_logit else {})


@tvm.transform.module_pass(opt_level=0, name="QuantizeKVCache")
class QuantizeKVCache:
    """Give the function "main" a packed KV cache, or, with ``simulate``, quantize and dequantize its K and V in place.

    ``simulate`` works on models without a cache too, keeps the signature and spells attention out, soft-capping and
    windows included, so that TVM can compile the result; it is for judging quality. ``every_logit``, for a step that
    returns the logits after every token: beside ``prefill`` and ``decode``, which return those after the last one,
    there is ``verify``, a prefill that returns all. Its tokens see each other as ``decode`` would show them where a
    layer has no policy, and as ``prefill`` does where it has one: in 16 bits or more. Raises
    ``ModelError`` naming the first site that cannot be rewritten, and ``FormatError`` for a head dimension that a
    format cannot take.
    """

    def __init__(self, config: KVCacheConfig, simulate: bool = False, every_logit: bool = False) -> None:
        self.config, self.simulate, self.every_logit = config, simulate, every_logit

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``mod``."""
        func = _main(mod, self.simulate)
        sites = find_attention(func)
        if not sites:
            raise ModelError("the model has no attention, so there is no KV cache to quantize")
        config, kept = self.config.fitted([site.head_dim for site in sites])
        if self.simulate:
            return SpellOutAttention()(Simulation(mod, sites, config).module())
        layers = [LayerCache.of(site, len(sites), config) for site in sites]
        for site in sites:
            if site.reason:
                raise ModelError(f"attention {site.index} ({site.output.name}) cannot be rewritten: {site.reason}")
        names = [f"weight_{i:04d}" for i in range(len(func.params) - int(func.attrs["num_input"]))]
        info = json.dumps(cache_info(func, layers, names, self.every_logit))
        steps = self._steps(func)
        builder = relax.BlockBuilder(_without_main(mod))
        kernels = KernelLibrary(builder)
        builder.add_func(_info_function(info), "kv_cache_info")
        builder.add_func(_create_function(layers), "create_kv_cache")
        for name, body in steps.items():
            chunk = name != "decode"
            quantize = chunk and self.config.quantize_chunk
            _CachedStep(builder, kernels, body, layers, chunk, quantize, name == "verify").emit(name)
        result = builder.finalize()
        result = relax.transform.DeadCodeElimination([*steps, "create_kv_cache", "kv_cache_info"])(result)
        if kept:
            for name in steps:
                result[name] = result[name].with_attr(KEPT_ATTR, json.dumps(kept))
        relax.analysis.well_formed(result)
        return result

    def _steps(self, func: relax.Function) -> dict[str, relax.Function]:
        """The model's step as each of the library's functions computes it, by name."""
        every = {}
        if self.every_logit:
            if not returns_every_logit(func):
                raise ModelError("the step returns the logits of one token; import the model with every_logit=True")
            every["verify"], func = func, with_last_logits(func)
        seq, step = func.params[0].ty.shape[1], tvm.IRModule({"main": func})
        single = relax.transform.BindSymbolicVars({seq.name: 1}, "main")(step)["main"]
        return {"prefill": func, "decode": relax.utils.copy_with_new_vars(single)} | every


def kept_layers(func: relax.Function) -> dict[int, dict[str, str]]:
    """By layer, why its "k" or "v" stay in 16 bits where another format was asked for."""
    text = (func.attrs or {}).get(KEPT_ATTR)
    return {} if text is None else {int(layer): reasons for layer, reasons in json.loads(str(text)).items()}


def read_cache_info(mod: tvm.IRModule) -> dict[str, Any]:
    """What the module's ``kv_cache_info`` will return, as plain data."""
    return json.loads(str(mod["kv_cache_info"].body.blocks[0].bindings[0].value.value))


def with_cache_info(mod: tvm.IRModule, info: dict[str, Any]) -> tvm.IRModule:
    """The module with another description in ``kv_cache_info``."""
    result = tvm.IRModule(mod.functions, attrs=mod.attrs)
    result.update_func(mod.get_global_var("kv_cache_info"), _info_function(json.dumps(info)))
    return result


def _main(mod: tvm.IRModule, simulate: bool) -> relax.Function:
    """The function "main"; raises ``ModelError`` if there is none, or one that no importer made."""
    func = mod["main"] if "main" in {gvar.name_hint for gvar in mod.get_global_vars()} else None
    if not isinstance(func, relax.Function):
        raise ModelError('the module has no Relax function "main"; import a model first')
    if not simulate and "num_input" not in (func.attrs or {}):
        raise ModelError('the function "main" does not say which of its parameters are weights (num_input)')
    return func


def _without_main(mod: tvm.IRModule) -> tvm.IRModule:
    return tvm.IRModule({g: f for g, f in mod.functions_items() if g.name_hint != "main"}, attrs=mod.attrs)


def _info_function(info: str) -> relax.Function:
    builder = relax.BlockBuilder()
    with builder.function("kv_cache_info", []):
        builder.emit_func_output(builder.emit(tvm.ir.StringImm(info)))
    return builder.finalize()["kv_cache_info"]


def _create_function(layers: list[LayerCache]) -> relax.Function:
    batch, capacity = (relax.Var(name, tvm.ir.PrimType("int64")) for name in ("batch", "capacity"))
    builder = relax.BlockBuilder()
    with builder.function("create_kv_cache", [batch, capacity]):
        with builder.dataflow():
            types = [array for layer in layers for array in layer.created(batch, capacity)]
            counts = 2 if any(layer.policy.segmented for layer in layers) else 1
            types += [relax.TensorType([batch], "int32")] * counts
            zeros = [relax.op.zeros(array.shape, str(array.dtype)) for array in types]
            output = builder.emit_output(relax.Tuple([builder.emit(array) for array in zeros]))
        builder.emit_func_output(output)
    return builder.finalize()["create_kv_cache"]


class _CachedStep:
    """Rebuilds one step function over the packed cache.

    With ``quantize`` the chunk's keys and values are quantized and dequantized before attention reads them, with
    ``as_decode`` those of layers without a policy.
    """

    def __init__(
        self,
        builder: relax.BlockBuilder,
        kernels: KernelLibrary,
        func: relax.Function,
        layers: list[LayerCache],
        chunk: bool,
        quantize: bool,
        as_decode: bool,
    ) -> None:
        self.builder, self.kernels, self.func, self.chunk = builder, kernels, func, chunk
        sites = find_attention(func)
        self.sites = {site.output: site for site in sites}
        self.layers, self.quantize, self.as_decode = layers, quantize, as_decode
        self.inputs = int(func.attrs["num_input"])
        self.batch, self.seq = func.params[0].ty.shape
        self.copy = BindingCopy(builder)

    def emit(self, name: str) -> None:
        """Add the function ``name`` to the builder's module."""
        ids = relax.Var("ids", relax.TensorType([self.batch, self.seq], "int32"))
        counts = relax.TensorType([self.batch], "int32")
        new_lengths = relax.Var("new_lengths", counts)
        arrays = [layer.parameters(self.batch) for layer in self.layers]
        policies = {layer.policy for layer in self.layers if layer.policy.segmented}
        packed = [relax.Var("packed", counts)] if policies else []
        lengths = relax.Var("lengths", counts)
        weights = [relax.Var(p.name, p.ty) for p in self.func.params[self.inputs :]]
        inputs = [ids, new_lengths] if self.chunk else [ids]
        for old, new in zip(self.func.params[self.inputs :], weights, strict=True):
            self.copy.replace(old, new)
        inputs += [*(array for layer in arrays for array in layer), *packed, lengths]
        with self.builder.function(name, [*inputs, *weights], attrs={"num_input": len(inputs)}):
            with self.builder.dataflow():
                if not self.chunk:
                    one = relax.const(1, "int32")
                    new_lengths = self.builder.emit(relax.op.full(relax.ShapeExpr([self.batch]), one, "int32"))
                total = self._advance(lengths, new_lengths)
                self._bind_inputs(ids, total, new_lengths)
                plan = self._plan(packed[0], total, *policies) if policies else ()
                stored = list(zip(self.layers, arrays, strict=True))
                counts = StepLengths(total, new_lengths, *plan)
                attention = SiteAttention(
                    self.builder, self.kernels, self.copy, stored, counts, self.chunk, self.quantize, self.as_decode
                )
                output = self.builder.emit_output(attention.joined(self._body(attention)))
            self.builder.emit_func_output(output)

    def _advance(self, lengths: relax.Var, new_lengths: relax.Var) -> relax.Var:
        call = relax.op.call_tir_inplace(self.kernels.advance(), relax.Tuple([lengths, new_lengths]), 0, lengths.ty)
        return self.builder.emit(call)

    def _plan(self, packed: relax.Var, total: relax.Var, policy: CachePolicy) -> tuple[relax.Var, relax.Var]:
        """The tokens in tiles before and after this call."""
        kernel, emit = self.kernels.plan_flush(policy, self.chunk), self.builder.emit
        arguments = relax.Tuple([packed, total])
        pair = emit(relax.op.call_tir_inplace(kernel, arguments, [0, -1], [packed.ty, packed.ty]))
        after, before = (emit(relax.TupleGetItem(pair, i)) for i in range(2))
        return before, after

    def _bind_inputs(self, ids: relax.Var, total: relax.Var, new_lengths: relax.Var) -> None:
        """The step's ids, positions and last indices, from the sequences' lengths."""
        op, emit = relax.op, self.builder.emit
        start = emit(op.expand_dims(op.subtract(total, new_lengths), 1))
        steps = emit(op.expand_dims(op.arange(0, self.seq, 1, "int32"), 0))
        positions = op.add(start, steps)
        if self.chunk:  # padding takes the last token's position: those that follow may be beyond the model's
            newest = emit(op.expand_dims(op.subtract(total, relax.const(1, "int32")), 1))
            positions = op.maximum(op.minimum(positions, newest), relax.const(0, "int32"))
        last = op.maximum(op.subtract(new_lengths, relax.const(1, "int32")), relax.const(0, "int32"))
        for old, new in zip(self.func.params[:3], (ids, positions, last), strict=True):
            value = emit(new if str(old.ty.dtype) == "int32" else op.astype(new, old.ty.dtype))
            self.copy.replace(old, emit(relax.op.reshape(value, old.ty.shape)) if value.ty.ndim < 0 else value)

    def _body(self, attention: SiteAttention) -> relax.Expr:
        graph = dataflow_graph(self.func)
        stale, lengths = set(self.func.params[3 : self.inputs]), self._past_lengths()
        for block in self.func.body.blocks:
            for binding in block.bindings:
                if binding.var in self.sites:
                    site = self.sites[binding.var]
                    if stale.intersection((site.call.args[0], site.key.new, site.value.new)):
                        raise ModelError(f"attention {site.index} ({site.output.name}): its new tokens read the past")
                    self.copy.replace(binding.var, attention.emit(site))
                elif any(used in stale for used in graph.predecessors(binding.var)):
                    stale.add(binding.var)
                elif _mentions(binding, lengths):
                    raise ModelError("the model uses the past's length outside attention; only positions may tell it")
                else:
                    self.copy.emit(binding)
        logits = _logits(self.func)
        if logits in stale:
            raise ModelError("the model's logits read a past key or value outside attention")
        return self.copy.expr(logits)

    def _past_lengths(self) -> list[tvm.tirx.Var]:
        """The symbolic lengths of the past inputs."""
        sizes = [param.ty.shape[2] for param in self.func.params[3 : self.inputs]]
        return [size for size in sizes if isinstance(size, tvm.tirx.Var)]


def _mentions(binding: relax.Binding, sizes: list[tvm.tirx.Var]) -> bool:
    found: list[tvm.tirx.Var] = []
    structural_walk([binding.value, binding.var.ty], (tvm.tirx.Var, found.append))
    return any(var.same_as(size) for var in found for size in sizes)


def _logits(func: relax.Function) -> relax.Var:
    """The first element of the tuple that the function returns."""
    result = func.body.body
    for block in func.body.blocks:
        for binding in block.bindings:
            if binding.var.same_as(result):
                result = binding.value
    return result.fields[0] if isinstance(result, relax.Tuple) else result
