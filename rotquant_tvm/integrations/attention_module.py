"""A decoder of one attention whose queries, keys and values are given: what the passes make of it is a packed cache.

Rotations are constants of such a module, so that the passes can move them; afterwards they become parameters
(``take_rotations``), and one library serves every layer of a model.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax import op
from tvm.relax.expr_functor import PyExprMutator, mutator

from ..formats import TOKENS
from ..frontend.step_graph import SOFTCAPS
from ..ops.site_shape import SiteShape
from ..passes.kv_kernels import KernelLibrary, rotation_constant
from .attention_geometry import AttentionGeometry, layer_rotations

STEPS = ("prefill", "decode")
READ = "read"


def attention_module(geometry: AttentionGeometry) -> tvm.IRModule:
    """The canonical module of the attention; its "weights" are q, k and v, its "logits" the output.

    q and the output are [batch, seq, heads, head_dim], k and v [batch, kv_heads, seq, head_dim].
    """
    batch, seq, past = (tirx.Var(name, "int64") for name in ("batch", "seq", "past"))
    tensor, dtype, dim, heads = relax.TensorType, geometry.dtype, geometry.head_dim, geometry.kv_heads
    index = [("ids", [batch, seq]), ("positions", [batch, seq]), ("last", [batch])]
    inputs = [relax.Var(name, tensor(shape, "int32")) for name, shape in index]
    pasts = [relax.Var(f"past_{role}_0", tensor([batch, heads, past, dim], dtype)) for role in "kv"]
    query = relax.Var("q", tensor([batch, seq, geometry.heads, dim], dtype))
    new = [relax.Var(role, tensor([batch, heads, seq, dim], dtype)) for role in "kv"]
    attrs = {"num_input": len(inputs) + len(pasts), "rotquant.inputs": {name: name for name, _ in index}}
    if geometry.softcap is not None:
        attrs[SOFTCAPS] = [float(geometry.softcap)]
    builder = relax.BlockBuilder()
    emit = builder.emit
    with builder.function("main", [*inputs, *pasts, query, *new], attrs=attrs):
        with builder.dataflow():
            presents = [emit(op.concat(pair, axis=2)) for pair in zip(pasts, new, strict=True)]
            keys, values = (emit(op.permute_dims(x, [0, 2, 1, 3])) for x in presents)
            options = {"causal_mask": "BottomRight", "window_size": geometry.window}
            output = emit(op.nn.attention(query, keys, values, scale=geometry.scale, **options))
            result = builder.emit_output(relax.Tuple([output, *presents]))
        builder.emit_func_output(result)
    return builder.finalize()


def with_read(mod: tvm.IRModule, geometry: AttentionGeometry) -> tvm.IRModule:
    """The module with ``read(*arrays, lengths) -> (k, v)``: what is stored, as it was given, by position.

    k and v are float32 [batch, kv_heads, longest, head_dim] with room for every slot, zero from the lengths on. Only
    for geometries without a window.
    """
    config, shape = geometry.config(), _shape(geometry)
    codecs, policy = config.codecs(0, 1, geometry.head_dim), config.layer_policy(0, 1)
    builder = relax.BlockBuilder(mod)
    kernels = KernelLibrary(builder)
    stored = [relax.Var(param.name, param.ty) for param in mod["decode"].params]
    arrays = [var for var in stored if var.name.split("_")[0] in ("cache", "centre", "plain")]
    counts = [var for var in stored if var.name in ("packed", "lengths")]
    batch, heads, tiles, _ = arrays[0].ty.shape
    longest = tiles * TOKENS + (policy.sinks + policy.ring if policy.segmented else 0)
    dense = relax.TensorType([batch, heads, longest, geometry.head_dim], "float32")
    kernel = kernels.dequantize_segments(shape) if policy.segmented else kernels.dequantize_cache(shape)
    emit = builder.emit
    with builder.function(READ, [*arrays, *counts], attrs={"num_input": len(arrays) + len(counts)}):
        with builder.dataflow():
            pair = emit(relax.call_tir(kernel, [*arrays, *counts], [dense, dense]))
            parts = [emit(relax.TupleGetItem(pair, i)) for i in range(2)]
            for role, codec in enumerate(codecs):
                rotation = codec.inverse_rotation
                if not rotation.identity:
                    rotate = kernels.rotate(rotation.structure, rotation.head_dim, "float32")
                    parts[role] = emit(relax.call_tir(rotate, [parts[role], rotation_constant(rotation)], dense))
            output = builder.emit_output(relax.Tuple(parts))
        builder.emit_func_output(output)
    return builder.finalize()


def _shape(geometry: AttentionGeometry) -> SiteShape:
    formats, policy = geometry.config().formats, geometry.config().layer_policy(0, 1)
    sizes = (geometry.heads, geometry.kv_heads, geometry.head_dim, geometry.scale, None, geometry.dtype)
    return SiteShape(formats.k.name, formats.v.name, *sizes, policy=policy.name)


def take_rotations(mod: tvm.IRModule, geometry: AttentionGeometry) -> tvm.IRModule:
    """The module whose functions take the rotations' coefficients as their last parameters, float32 [size].

    Those that are no identity, in the order of ``ROTATIONS``. The functions lose the ids, of which only the shape
    counted, and begin with q, k and v.
    """
    config = geometry.config()
    rotations = layer_rotations(config, 0, 1, geometry.head_dim)
    known = {name: np.asarray(rotation.data, np.float32) for name, rotation in rotations.items()}
    for name, data in known.items():
        if any(other != name and np.array_equal(data, known[other]) for other in known):
            raise RuntimeError(f"{name} cannot be told from another rotation of the layer")
    result = tvm.IRModule(mod.functions, attrs=mod.attrs)
    for name in (*STEPS, READ):
        if any(gvar.name_hint == name for gvar in mod.get_global_vars()):
            result[name] = _TakeRotations(known, name in STEPS).rewrite(mod[name])
    relax.analysis.well_formed(result)
    return result


@mutator
class _TakeRotations(PyExprMutator):  # type: ignore[misc]
    def __init__(self, known: dict[str, np.ndarray], step: bool) -> None:
        super().__init__()
        self.known, self.step = known, step
        self.params = {
            name: relax.Var(name, relax.TensorType([data.size], "float32")) for name, data in known.items()
        }

    def rewrite(self, func: relax.Function) -> relax.Function:
        """The function with its new parameters."""
        body = self.visit_expr(func.body)
        params = list(func.params)
        if self.step:
            count = int(func.attrs["num_input"])
            params = [*params[count:], *params[1:count]]
        params += self.params.values()
        made = relax.Function(params, body, func.ret_ty, func.is_pure, func.attrs)
        return relax.utils.copy_with_new_vars(made.with_attr("num_input", len(params)))

    def visit_generic_const_(self, constant: tvm.ir.GenericConst) -> relax.Expr:
        """Replace a rotation's coefficients."""
        value = constant.value.numpy()
        for name, data in self.known.items():
            if value.dtype == np.float32 and np.array_equal(value, data):
                return self.params[name]
        if value.size > 1:  # only rotations have so many; the layers would share this one
            raise RuntimeError("a constant of the attention is none of its rotations")
        return constant
