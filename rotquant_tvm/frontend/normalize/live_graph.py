"""What the logits are computed from once attention takes its keys and values from the cache and needs no mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import tvm
from tvm import relax

from rotquant_tvm.frontend.normalize.cache_forms import SiteCache, capacity_of
from rotquant_tvm.frontend.normalize.cases import Case, StepInputs
from rotquant_tvm.frontend.normalize.evaluate import Evaluation
from rotquant_tvm.frontend.normalize.input_roles import IDS, OTHER, PAST
from rotquant_tvm.frontend.normalize.lengths import cases_around, whole_numbers
from rotquant_tvm.frontend.normalize.operator_table import Unevaluable
from rotquant_tvm.frontend.normalize.sites import Site
from rotquant_tvm.frontend.normalize.size_arithmetic import size_vars
from rotquant_tvm.frontend.normalize.step_view import dims, op_name, operands


class LiveGraph:
    """The variables that matter for ``roots``.

    Attributes: ``order`` (all of them that are bound, in order), ``params`` (parameters among them), ``tokens`` (those
    whose values are computed from token ids), ``readers`` (live readers of each variable), ``settled`` (variables
    bound to ``where`` with a condition that is the same everywhere, to the operand that they therefore are: a guard
    against rows of attention that see nothing, say).
    """

    def __init__(
        self,
        step: StepInputs,
        sites: list[Site],
        caches: list[SiteCache],
        roots: list[relax.Expr],
        replaced: Mapping[relax.Var, list[relax.Var]] | None = None,
        settled: dict[relax.Var, relax.Var] | None = None,
    ) -> None:
        """``replaced``: variables that get other values, to the variables that those are made of.

        ``settled``: of an earlier graph of the same roots.
        """
        self.step = step
        self._replaced: dict[relax.Var, list[relax.Var]] = dict(replaced or {})
        self.settled: dict[relax.Var, relax.Var] = settled or {}
        self._known = settled is not None
        self._capacity = capacity_of(caches)
        self._evaluations: dict[Case, Evaluation] = {}
        self._attention: dict[relax.Var, list[relax.Expr]] = {
            site.output: [site.call.args[0], cache.key.new, cache.value.new]
            for site, cache in zip(sites, caches, strict=True)
        }
        view = step.view
        found: set[relax.Var] = set()
        waiting = [var for root in roots for var in ([root] if isinstance(root, relax.Var) else operands(root))]
        while waiting:
            var = waiting.pop()
            if var not in found:
                found.add(var)
                self._settle(var)
                waiting += self.operands(var)
        self._evaluations.clear()
        self.order = [var for var in view.values if var in found]
        self.params = [param for param in view.function.params if param in found]
        self.readers: dict[relax.Var, list[relax.Var]] = {var: [] for var in found}
        for var in self.order:
            for used in dict.fromkeys(self.operands(var)):
                self.readers[used].append(var)
        self.tokens = self.reached(step.roles.of(IDS, step.inputs))

    def operands(self, var: relax.Var) -> list[relax.Var]:
        """The variables that a live one reads: of attention the queries and the new keys and values."""
        if var in self._attention:
            return [operand for operand in self._attention[var] if isinstance(operand, relax.Var)]
        if var in self._replaced:
            return self._replaced[var]
        if var in self.settled:
            return [self.settled[var]]
        return self.step.view.uses.get(var, [])

    def _settle(self, var: relax.Var) -> None:
        """Learn whether a variable is one operand of a ``where``, for every sequence without padding."""
        view, value = self.step.view, self.step.view.value(var)
        if self._known or op_name(value) != "where" or not isinstance(value.args[0], relax.Var):
            return
        inputs = dict(zip(self.step.inputs, self.step.roles.kinds, strict=True))
        read = view.slice([value.args[0]], stop=lambda used: used in self._attention)
        if any(used in self._attention or inputs.get(used) in (IDS, PAST, OTHER) for used in read):
            return
        cases = cases_around(whole_numbers(self.step, [value.args[0]]), PAST in inputs.values(), self._capacity, False)
        try:
            conditions = [np.asarray(self._evaluation(case).value(value.args[0])) for case in cases]
        except Unevaluable:
            return
        for operand, wanted in ((value.args[1], True), (value.args[2], False)):
            same = isinstance(operand, relax.Var) and [str(n) for n in dims(operand)] == [str(n) for n in dims(var)]
            if same and all((condition == wanted).all() for condition in conditions):
                self.settled[var] = operand

    def _evaluation(self, case: Case) -> Evaluation:
        """The evaluation of a case; layers share what they compute."""
        if case not in self._evaluations:
            self._evaluations[case] = self.step.evaluation(case)
        return self._evaluations[case]

    def is_attention(self, var: relax.Var) -> bool:
        """Whether a variable is the output of an attention."""
        return var in self._attention

    def reached(self, roots: Iterable[relax.Var]) -> set[relax.Var]:
        """The live variables that read one of ``roots``, directly or not; the live roots are part of them."""
        found = {root for root in roots if root in self.readers}
        for var in self.order:
            if any(used in found for used in self.operands(var)):
                found.add(var)
        return found

    def weights_alone(self, expr: relax.Expr) -> bool:
        """Whether an expression is computed from weights and constants, without any size of the inputs."""
        if isinstance(expr, tvm.ir.GenericConst):
            return True
        inputs = set(self.step.inputs)
        view = self.step.view
        return all(
            var not in inputs and not (var in view.values and size_vars([view.values[var], var.ty]))
            for var in view.slice([expr])
        )
