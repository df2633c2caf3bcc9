"""Which kernels work on the KV cache of each layer of a compiled module, and where each comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import tvm
from tvm import relax

from .codegen import is_tirx
from .ops.site_shape import OP_ATTR
from .schedules.knobs import RECORD_ATTR
from .schedules.vector_kv_kernels import HAND_LAID_ATTR

FUNCTIONS = ("prefill", "decode", "verify")
_TIR_CALLS = ("relax.call_tir", "relax.call_tir_inplace")
_LAYER = re.compile(r"_(\d+)$")


def kv_kernels(mod: tvm.IRModule) -> list[str]:
    """Names of the module's KV kernels, sorted."""
    functions = mod.functions_items()
    return sorted(g.name_hint for g, f in functions if isinstance(f, tvm.tirx.PrimFunc) and _operator(f))


def records_used(mod: tvm.IRModule) -> list[dict[str, Any]]:
    """The tuning records that the module's kernels are from, each with the kernels' names, sorted."""
    found: dict[str, list[str]] = {}
    for gvar, func in mod.functions_items():
        record = (func.attrs or {}).get(RECORD_ATTR) if isinstance(func, tvm.tirx.PrimFunc) else None
        if record is not None:
            found.setdefault(str(record), []).append(gvar.name_hint)
    return [{"record": record, "kernels": sorted(names)} for record, names in sorted(found.items())]


def layer_kernels(mod: tvm.IRModule, layers: int) -> list[list[dict[str, Any]]]:
    """Per layer, its KV kernels in the order in which prefill, decode and verify first call them.

    A kernel is {"operator", "kernel" (its name in the module), "functions" (which of these call it), "source"}.
    It is a layer's if it takes one of the layer's cache arrays, which are the functions' inputs whose names end in
    ``_<layer>``, or what an update in place made of one.
    """
    found: list[dict[str, dict[str, Any]]] = [{} for _ in range(layers)]
    names = {gvar.name_hint for gvar in mod.get_global_vars()}
    for function in FUNCTIONS:
        for layer, gvar in _calls(mod[function], layers) if function in names else ():
            operator = _operator(mod[gvar])
            if not operator:
                continue
            kernel = found[layer].setdefault(
                gvar.name_hint,
                {"operator": operator, "kernel": gvar.name_hint, "functions": [], "source": _source(mod[gvar])},
            )
            if function not in kernel["functions"]:
                kernel["functions"].append(function)
    return [list(kernels.values()) for kernels in found]


def _calls(func: relax.Function, layers: int) -> Iterator[tuple[int, tvm.ir.GlobalVar]]:
    """(layer, kernel) of every call of a kernel that takes a cache array."""
    owner: dict[relax.Var, int] = {}
    for param in func.params[: int(func.attrs["num_input"])]:
        layer = _LAYER.search(param.name)
        if layer is not None and int(layer[1]) < layers:
            owner[param] = int(layer[1])
    for block in func.body.blocks:
        for binding in block.bindings:
            value = binding.value
            name = getattr(value.op, "name", "") if isinstance(value, relax.Call) else ""
            operands = list(value.args[1]) if name in _TIR_CALLS else [_renamed(value)]
            layer_of = next((owner[x] for x in operands if isinstance(x, relax.Var) and x in owner), None)
            if layer_of is None:
                continue
            if name in _TIR_CALLS:
                yield layer_of, value.args[0]
            if name != "relax.call_tir":  # an update in place, one of its results, or another name
                owner[binding.var] = layer_of


def _renamed(value: relax.Expr) -> relax.Expr | None:
    """What a binding that computes nothing stands for."""
    if isinstance(value, relax.TupleGetItem):
        return value.tuple_value
    return value if isinstance(value, relax.Var) else None


def _operator(func: tvm.tirx.PrimFunc) -> str:
    return str((func.attrs or {}).get(OP_ATTR, ""))


def _source(func: tvm.tirx.PrimFunc) -> str:
    """The tuning record that a kernel is built from, or else the rule."""
    attrs = func.attrs or {}
    hand_laid, record = attrs.get(HAND_LAID_ATTR), attrs.get(RECORD_ATTR)
    if record is not None:
        return f"record: {record}"
    if hand_laid is None:
        return "rule: definition"
    return f"rule: {'GPU' if is_tirx(func) else 'vector'} kernel {hand_laid}"
