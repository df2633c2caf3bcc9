"""The functions of a model's own work: which of them can be tuned, and the TensorIR that MetaSchedule knows them by."""

from __future__ import annotations

import re

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.tirx import BufferStore

from ..ops.linear import LINEAR, LinearShape, linear
from ..ops.model_op import model_attrs, model_op, model_properties
from ..ops.rms_norm import RMS_NORM, rms_norm
from ..ops.site_shape import OP_ATTR
from ..schedules.knobs import KNOBS_ATTR, RECORD_ATTR
from ..schedules.model_kernels import LOOPS

_SCHEDULED = "tirx.is_scheduled"
_LONGEST_NAME = 40


def definition_of(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The schedulable definition of what a function does; itself where it is one."""
    operator = model_op(func)
    if operator == LINEAR:
        made = linear(LinearShape.read(model_properties(func)))
    elif operator == RMS_NORM:
        found = model_properties(func)
        made = rms_norm(int(found["features"]), float(found["epsilon"]), int(found["leading"]))
    else:
        return func
    kept = {name: func.attrs[name] for name in (KNOBS_ATTR, RECORD_ATTR) if name in func.attrs}
    return made.with_attrs(kept) if kept else made


def as_model_function(func: tirx.PrimFunc, name: str) -> tirx.PrimFunc | None:
    """A function that says which operator of the model it is: as it came, or as ``LOOPS``; None for all others.

    Loops are what TVM made of the model's operators and nothing has scheduled yet. They are told by their structure;
    ``name`` is for people.
    """
    if model_op(func) is not None:
        return func
    if func.attrs is None or OP_ATTR in func.attrs or func.attrs.get(_SCHEDULED) or not func.attrs.get("s_tir"):
        return None
    if not isinstance(func.body, s_tir.SBlockRealize) or not all(hasattr(param, "shape") for param in func.params):
        return None
    params = list(func.params)
    written, gathered = _accesses(func)
    if len(params) == 2 and _only_moves(func):  # a reshape or a transpose: mostly a view in the end
        return None
    results = [index for index, param in enumerate(params) if param in written]
    if not results or results != list(range(max(1, results[0]), len(params))):  # an update in place, or no inputs
        return None
    bare = func.without_attr("global_symbol") if "global_symbol" in func.attrs else func
    properties = {
        "loops": f"{int(tvm_ffi.structural_hash(bare)) & (1 << 64) - 1:016x}",
        "name": re.sub(r"\d+(?=_|$)|fused_|tir_", "", name)[:_LONGEST_NAME],
        "results": len(results),
        "gathered": [index for index, param in enumerate(params) if param in gathered],
    }
    return func.with_attrs(model_attrs(LOOPS, properties))


def _accesses(func: tirx.PrimFunc) -> tuple[set[tirx.Var], set[tirx.Var]]:
    """The parameters that are written, and those read at places that other tensors hold."""
    params = set(func.params)
    written: set[tirx.Var] = set()
    gathered: set[tirx.Var] = set()

    def store(node: BufferStore) -> None:
        written.update({node.buffer} & params)

    def load(node: TensorLoad) -> None:
        inner: list[object] = []
        for index in node.indices:
            tvm_ffi.structural_walk(index, (TensorLoad, inner.append))
        if inner:
            gathered.update({node.source} & params)

    tvm_ffi.structural_walk(func.body, [(BufferStore, store), (TensorLoad, load)])
    return written, gathered


def _only_moves(func: tirx.PrimFunc) -> bool:
    """Whether every value stored is one that was loaded."""
    values: list[tvm.ir.Expr] = []
    tvm_ffi.structural_walk(func.body, (BufferStore, lambda node: values.append(node.value)))
    return all(isinstance(value, TensorLoad) for value in values)


def model_functions(mod: tvm.IRModule) -> list[tirx.PrimFunc]:
    """The functions of a module, fused and not scheduled yet, that are the model's own work, by name."""
    found = []
    for gvar in sorted(mod.get_global_vars(), key=lambda gvar: str(gvar.name_hint)):
        func = mod[gvar]
        known = as_model_function(func, str(gvar.name_hint)) if isinstance(func, tirx.PrimFunc) else None
        if known is not None:
            found.append(known)
    return found
