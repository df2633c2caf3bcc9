"""Knobs: the numbers that a kernel laid out by hand leaves open, and the kernel that there is for a definition.

A rule's module says which values its knobs may have (``KNOBS``); a definition that carries the attribute
``KNOBS_ATTR`` has chosen some of them, and the rule has defaults for the rest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tvm import tirx
from tvm.target import Target

from rotquant_tvm.ops.model_op import MODEL_OP_ATTR
from rotquant_tvm.ops.site_shape import OP_ATTR

KNOBS_ATTR = "rotquant.knobs"
"""Function attribute of a definition: a JSON object, knob to value."""

RECORD_ATTR = "rotquant.record"
"""Function attribute: the tuning record that the knobs come from, as the compile report names it."""

Knobs = dict[str, int]


def chosen_knobs(func: tirx.PrimFunc) -> Knobs:
    """The knobs that a definition has chosen; empty if it leaves all to the rule."""
    text = func.attrs.get(KNOBS_ATTR) if func.attrs is not None else None
    return {} if text is None else {name: int(value) for name, value in json.loads(str(text)).items()}


def with_knobs(func: tirx.PrimFunc, knobs: Mapping[str, int]) -> tirx.PrimFunc:
    """The definition with these knobs chosen, instead of any before."""
    if not knobs:
        return func.without_attr(KNOBS_ATTR) if func.attrs is not None and KNOBS_ATTR in func.attrs else func
    return func.with_attr(KNOBS_ATTR, json.dumps(dict(knobs)))


def keep_choice(definition: tirx.PrimFunc, kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """The kernel, carrying the definition's knobs and where they come from."""
    attrs = definition.attrs or {}
    return kernel.with_attrs({name: attrs[name] for name in (KNOBS_ATTR, RECORD_ATTR) if name in attrs})


def rule_of(func: tirx.PrimFunc, target: Target) -> Callable[..., Any] | None:
    """The rule that a target has for a definition's operator; it may still decline the definition."""
    attrs = func.attrs or {}
    name = attrs.get(MODEL_OP_ATTR if _of_model(func) else OP_ATTR)
    return None if name is None else rule_named(str(name), target.kind.name)


def rule_named(operator: str, kind: str) -> Callable[..., Any] | None:
    """The rule for an operator, of the cache or of a model, on a kind of target."""
    from .model_kernels import MODEL_RULES

    if (operator, kind) in MODEL_RULES:
        return MODEL_RULES[operator, kind]
    if kind == "cuda":
        from .gpu_kv_kernels import RULES

        return RULES.get(operator)
    from .vector_kv_kernels import RULES as VECTOR_RULES

    return VECTOR_RULES.get(operator)


def knob_values(rule: Callable[..., Any], bucket: Mapping[str, int] | None = None) -> dict[str, tuple[int, ...]]:
    """The values that each knob of a rule's kernels may have; with a ``bucket`` of sizes, of those that matter there.

    A rule whose kernel holds several, by size, says in its module's ``knobs_at(bucket)`` which knobs those are.
    """
    values: Mapping[str, tuple[int, ...]] = getattr(sys.modules[rule.__module__], "KNOBS", {})
    decides = knobs_at(rule)
    names = values if bucket is None or decides is None else decides(bucket)
    return {name: tuple(int(value) for value in values[name]) for name in names}


def promising(rule: Callable[..., Any]) -> tuple[Knobs, ...]:
    """The choices that a search for a rule's knobs does well to try first (``PROMISING`` of its module), or none."""
    return tuple(dict(choice) for choice in getattr(sys.modules[rule.__module__], "PROMISING", ()))


def knobs_at(rule: Callable[..., Any]) -> Callable[[Mapping[str, int]], tuple[str, ...]] | None:
    """The function that tells which knobs matter at which sizes, for rules that have one."""
    return getattr(sys.modules[rule.__module__], "knobs_at", None)


def kernel_for(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc | None:
    """The kernel that takes a definition's place on a target; None where the definition stays."""
    if _of_model(func):
        from .model_kernels import model_kernel

        return model_kernel(func, target)
    if target.kind.name == "cuda":
        from .gpu_kv_kernels import gpu_kernel

        return gpu_kernel(func, target)
    from .vector_kv_kernels import vector_kernel

    return vector_kernel(func, target)


def _of_model(func: tirx.PrimFunc) -> bool:
    return func.attrs is not None and MODEL_OP_ATTR in func.attrs
