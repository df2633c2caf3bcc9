"""FindAttention: every attention of a function, by structure, with its K and V producers and cache tensors.

An attention site is one ``nn.attention*`` call; its key and value operands are followed back through layout changes
to a concatenation of a parameter (the past) with new tokens along the sequence axis. A call that comes near that
without matching is recorded with the reason.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import tvm
from tvm import relax

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.step_graph import SOFTCAPS

ATTENTION_OPS = ("relax.nn.attention", "relax.nn.attention_bias")
# What is followed from attention back to the cache; only the swap of heads and sequence can be rewritten.
LAYOUT_OPS = ("relax.permute_dims", "relax.reshape", "relax.astype", "relax.broadcast_to", "relax.repeat")
SWAP = "permute_dims [0, 2, 1, 3]"
SITES_ATTR = "rotquant.attention_sites"


@dataclass(frozen=True)
class CacheTensor:
    """The past of one K or V: parameter ``past``, ``new`` tokens and their concatenation ``present`` [b, h, s, d]."""

    past: relax.Var
    new: relax.Expr
    present: relax.Var


@dataclass(frozen=True)
class AttentionSite:
    """One attention: ``output`` is the variable bound to ``call``; ``key`` and ``value`` are None without a cache.

    ``softcap``: scaled scores s become softcap · tanh(s / softcap). ``reason`` is empty if the site can be rewritten,
    else it says why not.
    """

    index: int
    output: relax.Var
    call: relax.Call
    key: CacheTensor | None
    value: CacheTensor | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    reason: str
    softcap: float | None = None

    @property
    def mask(self) -> str:
        """``causal``, ``window``, ``operand`` (a mask tensor) or ``none``."""
        if len(self.call.args) > 3:
            return "operand"
        return "window" if self.window else ("causal" if self.call.attrs.causal_mask else "none")

    def describe(self) -> dict[str, Any]:
        """The site as plain data."""
        return {
            "index": self.index,
            "variable": self.output.name,
            "operator": self.call.op.name,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "scale": self.scale,
            "mask": self.mask,
            "window": self.window,
            "softcap": self.softcap,
            "cached": self.key is not None,
            "verdict": "refuse" if self.reason else "quantize",
            "reason": self.reason,
        }


def dataflow_graph(func: relax.Function) -> nx.DiGraph:
    """The function's bindings as a graph: nodes are variables (data ``value``), edges go from used to user."""
    graph = nx.DiGraph()
    graph.add_nodes_from(func.params, value=None)
    for block in func.body.blocks:
        for binding in block.bindings:
            graph.add_node(binding.var, value=binding.value)
            for used in relax.analysis.all_vars(binding.value):
                graph.add_edge(used, binding.var)
    return graph


def find_attention(func: relax.Function) -> list[AttentionSite]:
    """All attention sites of a function, in the order in which they are computed.

    Raises ``ModelError`` if the function's ``rotquant.softcaps`` are not one finite bound for each.
    """
    graph = dataflow_graph(func)
    bindings = [binding for block in func.body.blocks for binding in block.bindings]
    calls = [
        (binding.var, binding.value)
        for binding in bindings
        if isinstance(binding.value, relax.Call) and getattr(binding.value.op, "name", "") in ATTENTION_OPS
    ]
    softcaps = _softcaps(func, len(calls))
    sites = [_site(graph, func, index, *call) for index, call in enumerate(calls)]
    return [replace(site, softcap=cap or None) for site, cap in zip(sites, softcaps, strict=True)]


def _softcaps(func: relax.Function, count: int) -> list[float]:
    """The attribute ``rotquant.softcaps``, or zeros."""
    given = func.attrs.get(SOFTCAPS) if func.attrs is not None else None
    caps = [0.0] * count if given is None else [float(cap) for cap in given]
    if len(caps) != count or any(not (0 <= cap < math.inf) for cap in caps):
        raise ModelError(f"{SOFTCAPS} {caps} does not fit the model's {count} attentions; import it again")
    return caps


def _site(
    graph: nx.DiGraph, func: relax.Function, index: int, output: relax.Var, call: relax.Call
) -> AttentionSite:
    query, key, value = call.args[:3]
    heads, head_dim = (int(query.ty.shape[axis]) for axis in (2, 3))
    kv_heads = int(key.ty.shape[2])
    scale = call.attrs.scale
    window = call.attrs.window_size
    key_cache, key_reason = _cache_tensor(graph, func, key, "key")
    value_cache, value_reason = _cache_tensor(graph, func, value, "value")
    reason = key_reason or value_reason or _shape_reason(call, key_cache)
    if call.op.name != "relax.nn.attention":
        reason = reason or "its mask is an operand that is not proven to be causal"
    elif call.attrs.causal_mask != "BottomRight":
        reason = reason or "it is not causal"
    elif heads % kv_heads:
        reason = reason or f"{heads} query heads are no multiple of {kv_heads} key heads"
    return AttentionSite(
        index,
        output,
        call,
        key_cache,
        value_cache,
        heads,
        kv_heads,
        head_dim,
        float(scale) if scale is not None else head_dim**-0.5,
        int(window) if window is not None else None,
        reason,
    )


def _shape_reason(call: relax.Call, key: CacheTensor | None) -> str:
    """Why the kernels cannot compute an attention of these shapes; empty if they can."""
    query, keys, values = (operand.ty.shape for operand in call.args[:3])
    checks = [("values of head_dim {} and queries of {}", values[3], query[3])]
    checks.append(("{} value heads and {} key heads", values[2], keys[2]))
    if key is not None:
        checks.append(("{} queries for {} new tokens", query[1], key.new.ty.shape[2]))
    for text, *sizes in checks:
        if not tvm.sym.Analyzer().can_prove_equal(*sizes):
            return "it has " + text.format(*(int(s) if isinstance(s, tvm.tirx.IntImm) else s for s in sizes))
    return ""


def _cache_tensor(
    graph: nx.DiGraph, func: relax.Function, operand: relax.Expr, role: str
) -> tuple[CacheTensor | None, str]:
    """Follow a key or value operand back to ``concat(past parameter, new)``; (None, reason) if there is none."""
    crossed: list[str] = []
    var = operand
    while isinstance(var, relax.Var):
        value = graph.nodes[var]["value"]
        name = getattr(value.op, "name", "") if isinstance(value, relax.Call) else ""
        if name == "relax.concat":
            return _from_concat(graph, func, var, value, role, crossed)
        if isinstance(value, relax.Var):
            var = value
        elif name in LAYOUT_OPS:
            crossed.append(_layout_name(value))
            var = value.args[0]
        else:
            found = name.removeprefix("relax.") or ("a parameter" if value is None else type(value).__name__)
            return None, f"its {role} has no cache: it comes from {found}, not from a past joined with new tokens"
    return None, f"its {role} is a constant"


def _from_concat(
    graph: nx.DiGraph, func: relax.Function, present: relax.Var, call: relax.Call, role: str, crossed: list[str]
) -> tuple[CacheTensor | None, str]:
    parts = list(call.args[0])
    if len(parts) != 2 or not any(parts[0].same_as(p) for p in func.params):
        return None, f"its {role} is concatenated, but not as (past parameter, new tokens)"
    rank = present.ty.ndim
    axis = int(call.attrs.axis) % rank if call.attrs.axis is not None else -1
    if rank != 4 or axis != 2:
        return None, f"its {role} cache is joined along axis {axis} of a rank {rank} tensor, not along [b, h, *s*, d]"
    tensor = CacheTensor(parts[0], parts[1], present)
    if other := _other_reader(graph, present):
        return tensor, f"its {role} cache has another reader: {other}"
    if any(name in ("broadcast_to", "repeat") for name in crossed):
        return tensor, f"its {role} heads are repeated before attention"
    if crossed != [SWAP]:
        path = " and ".join(reversed(crossed)) or "nothing"
        return tensor, f"its {role} cache reaches attention through {path}, not through one {SWAP}"
    return tensor, ""


def _layout_name(call: relax.Call) -> str:
    name = call.op.name.removeprefix("relax.")
    return f"{name} {[int(axis) for axis in call.attrs.axes]}" if name == "permute_dims" else name


def _other_reader(graph: nx.DiGraph, var: relax.Var) -> str:
    """What reads a cache tensor, other than attention and the function's results; empty if nothing does."""
    for user in graph.successors(var):
        value = graph.nodes[user]["value"]
        name = getattr(value.op, "name", "") if isinstance(value, relax.Call) else ""
        if name in LAYOUT_OPS or isinstance(value, relax.Var):
            if found := _other_reader(graph, user):
                return found
        elif name not in ATTENTION_OPS and not isinstance(value, relax.Tuple):
            return name or type(value).__name__
    return ""


@tvm.transform.module_pass(opt_level=0, name="FindAttention")
class FindAttention:
    """Record the attention sites of every Relax function as its attribute ``rotquant.attention_sites`` (JSON)."""

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Annotate ``mod``; the code is unchanged."""
        result = tvm.IRModule(mod.functions, attrs=mod.attrs)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                sites = [site.describe() for site in find_attention(func)]
                result[gvar] = func.with_attr(SITES_ATTR, json.dumps(sites))
        return result
