"""FoldRotation: constant rotations move into the weights of the linear layers before and after them.

R (W x + b) = (R W) x + R b, and W (Rᵀ y) = (W Rᵀ) y. So new values that come straight from a linear layer come rotated
from one whose weights are rotated, and the layer that reads attention's output reads it rotated. The same holds for
queries and keys where no rotary embedding lies between, or where it commutes (``foldable_rotations`` says when).
Each of the four is folded by itself: what cannot be is rotated by its kernel as before. The codes stay what they were,
but for values that rounding moves across a boundary.
"""

from __future__ import annotations

import json
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import mutator

from rotquant_tvm.formats import Rotation

from .foldable_rotations import NO_ROTATION, ROLES, Applied, Fold, FoldableRotations
from .folded_weights import with_weight_rotations
from .function_rewriter import FunctionRewriter
from .kv_kernels import KernelLibrary, kernel_of, rotation_constant, site_shape
from .weight_recipes import RECIPES_ATTR

REPORT_ATTR = "rotquant.folded_rotations"
"""JSON: per layer {role: {"weights": names, "reason": why not}} for the roles q, k, v and out."""

FUNCTIONS = ("prefill", "decode")
"""Those of every library; ``verify`` is a third of some."""


@tvm.transform.module_pass(opt_level=0, name="FoldRotation")
class FoldRotation:
    """Fold rotations into weights in the functions, which share the weights: all or none.

    Runs after ``HoistRotation`` and before the passes that pack weights (weights that are packed stay as they are).
    The functions say what their weights must take over (``folded_weights``), and what was folded.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``mod``; without both functions, or a second time, nothing changes."""
        names = {gvar.name_hint for gvar in mod.get_global_vars()}
        done = (RECIPES_ATTR, REPORT_ATTR)
        functions = [*FUNCTIONS, *names.intersection({"verify"})]
        if not names.issuperset(FUNCTIONS) or any(attr in mod[name].attrs for name in functions for attr in done):
            return mod
        found = {name: FoldableRotations(mod, mod[name]) for name in functions}
        folds = _agreed(*found.values())
        result = _Fold(mod, found, folds).transform()
        records = [record for layer in folds for role in ROLES for record in layer[role].weights]
        report = json.dumps([{role: _described(role, layer[role]) for role in ROLES} for layer in folds])
        for name in functions:
            func = with_weight_rotations(result[name], records).with_attr(REPORT_ATTR, report)
            result.update_func(result.get_global_var(name), func)
        return result


def folded_rotations(func: relax.Function) -> list[dict[str, Any]]:
    """What the pass says of each layer (see ``REPORT_ATTR``); empty where it has not run."""
    text = (func.attrs or {}).get(REPORT_ATTR)
    return [] if text is None else json.loads(str(text))


def fold_texts(layer: dict[str, Any]) -> dict[str, str]:
    """What was folded for K and for V of one layer, in words: ``{"k": "not folded: RoPE", "v": "W_v, W_o"}``."""
    return {role: _text({name: layer[name] for name in names}) for role, names in (("k", "qk"), ("v", ("v", "out")))}


def _text(entries: dict[str, dict[str, Any]]) -> str:
    weights = ", ".join(name for entry in entries.values() for name in entry["weights"])
    reasons = {_weight_name(role): entry["reason"] for role, entry in entries.items() if entry["reason"]}
    if set(reasons.values()) == {NO_ROTATION}:
        return NO_ROTATION
    if weights:
        return "; ".join([weights, *(f"not {name}: {reason}" for name, reason in reasons.items())])
    if len(set(reasons.values())) == 1:
        return f"not folded: {next(iter(reasons.values()))}"
    return "not folded: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _weight_name(role: str) -> str:
    return "W_o" if role == "out" else f"W_{role}"


def _agreed(*functions: FoldableRotations) -> list[dict[str, Fold]]:
    """Per layer and role what all functions can do; a weight that two folds would change is left alone."""
    changed: set[tuple[int, int, int]] = set()

    def fold(layer: int, role: str) -> Fold:
        found, *others = functions
        wanted = found.fold(layer, role)
        for other in others:
            if not wanted.reason and (again := other.fold(layer, role)) != wanted:
                wanted = Fold(reason=again.reason or "prefill and decode take its weights differently")
        positions = {place for record in wanted.weights for place in record.positions}
        if positions & changed:
            return Fold(reason="its weights are another tensor's too")
        changed.update(positions)
        return wanted

    return [{role: fold(layer, role) for role in ROLES} for layer in range(len(functions[0].layers))]


def _described(role: str, fold: Fold) -> dict[str, Any]:
    names = [_weight_name(role), f"b_{role}"][: len(fold.weights)]
    return {"weights": names, "reason": fold.reason}


@mutator
class _Fold(FunctionRewriter):
    def __init__(self, mod: tvm.IRModule, found: dict[str, FoldableRotations], folds: list[dict[str, Fold]]) -> None:
        super().__init__(mod)
        self.kernels = KernelLibrary(self.builder_)
        self.dropped: dict[relax.Var, relax.Expr] = {}
        self.appends: dict[relax.Var, set[str]] = {}
        for function in found.values():
            for layer, fold in zip(function.layers, folds, strict=True):
                for role, applied in layer.items():
                    if not fold[role].reason:
                        self._note(function, role, applied)

    def _note(self, function: FoldableRotations, role: str, applied: Applied) -> None:
        """Remember which calls of ``role`` go, and which change."""
        values = function.probe.value
        if role == "out":
            (call,) = applied.calls
            self.dropped[call] = values(call).args[1].fields[0]
            return
        for reader in function.probe.readers(applied.tensor):
            if kernel_of(self.mod, values(reader))[0] == "append":
                self.appends.setdefault(reader, set()).add(role)
            else:
                self.dropped[reader] = applied.tensor

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Drop the rotations whose weights have taken them over."""
        if binding.var in self.dropped:
            self.set_var_remap(binding.var, self.visit_expr(self.dropped[binding.var]))
        elif binding.var in self.appends:
            folded = "".join(sorted(self.appends[binding.var]))
            call = self._append(self.visit_expr_post_order(binding.value), folded)
            self.set_var_remap(binding.var, self.builder_.emit(call))
        else:
            super().visit_var_binding_(binding)

    def _append(self, call: relax.Call, rotated: str) -> relax.Call:
        """An append whose new keys or values come rotated."""
        func = self.mod[call.args[0]]
        names = [param.name for param in func.params]
        operands = list(call.args[1].fields)
        identity = rotation_constant(Rotation(site_shape(func).head_dim))
        for role in rotated:
            operands[names.index(f"rotation_{role}")] = identity
        kernel = self.kernels.append(site_shape(func), "seen" in names, rotated)
        return relax.op.call_tir_inplace(kernel, relax.Tuple(operands), 0, call.ty_args[0])
