"""Caches, shown to be concatenations by following tags through two calls.

Everything between the past, the new tokens and attention moves data. So the first call's past and new tokens are
filled with numbers that occur once, the presents it returns are given to the second call, and what attention
reads then must be: all of the first call's keys as they were, and behind them the new ones, in an order of axes that
is the same for both calls; so at small sizes, and across every number that the way holds (``lengths``). Whatever
the layouts are (heads merged with the batch, keys transposed, keys and values packed, a buffer written at positions),
such a cache is ``concat(past, new)`` by induction over calls. A cache that rolls, drops or rotates what it holds is
not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from tvm import relax

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize.cache_forms import Joined, SiteCache, capacity_of
from rotquant_tvm.frontend.normalize.cases import Case, StepInputs
from rotquant_tvm.frontend.normalize.evaluate import Evaluation
from rotquant_tvm.frontend.normalize.input_roles import PAST
from rotquant_tvm.frontend.normalize.lengths import whole_numbers
from rotquant_tvm.frontend.normalize.operator_table import Unevaluable
from rotquant_tvm.frontend.normalize.sites import ATTENTION, Site
from rotquant_tvm.frontend.normalize.step_view import value_operands
from rotquant_tvm.frontend.normalize.token_layout import TokenLayout, possible_layouts
from rotquant_tvm.frontend.step_graph import StepGraph

CALLS = (Case(5, 3), Case(8, 4))
FIRST_CALLS = (Case(0, 3), Case(3, 4))
SHORT_CALLS = (Case(0, 2), Case(2, 1))


@dataclass(frozen=True)
class SiteLayouts:
    """The layouts of a site's new keys and values."""

    key: TokenLayout
    value: TokenLayout


def find_layouts(step: StepInputs, sites: list[Site], caches: list[SiteCache], graph: StepGraph) -> list[SiteLayouts]:
    """The layout of every site's new tokens; raises ModelError for a cache that is no concatenation."""
    return _Tags(step, sites, caches, graph).layouts()


def find_presents(step: StepInputs, caches: list[SiteCache], graph: StepGraph) -> dict[relax.Var, int]:
    """For every past the output that is its present: the one that past's values, and no other's, reach."""
    news = {joined.new for cache in caches for joined in (cache.key, cache.value)}
    pasts = set(step.roles.of(PAST, step.inputs))
    found: dict[relax.Var, int] = {}
    for index, output in enumerate(step.view.outputs):
        read = step.view.slice([output], stop=lambda var: var in news or step.view.op(var) in ATTENTION)
        read = [var for var in read if var in pasts]
        if len(read) == 1:
            found.setdefault(read[0], index)
    for joined in [joined for cache in caches for joined in (cache.key, cache.value)]:
        past = joined.past
        if past is not None and past not in found:
            raise ModelError(
                f"{graph.source}: the past {past.name} is joined with new tokens, and no output returns the result"
            )
    return found


class _Tags:
    """Two calls of the step with tags for tokens."""

    def __init__(self, step: StepInputs, sites: list[Site], caches: list[SiteCache], graph: StepGraph) -> None:
        self.step, self.sites, self.caches, self.graph = step, sites, caches, graph
        self.presents = find_presents(step, caches, graph) if PAST in step.roles.kinds else {}
        self.capacity = capacity_of(caches)
        self.news = {joined.new for cache in caches for joined in (cache.key, cache.value)}
        self.next_tag = 1

    def layouts(self) -> list[SiteLayouts]:
        """The layouts of all sites."""
        found = []
        for site, cache in zip(self.sites, self.caches, strict=True):
            key = self._layout(f"the keys of {site.name}", cache.key)
            found.append(SiteLayouts(key, self._layout(f"the values of {site.name}", cache.value)))
        return found

    def _layout(self, what: str, joined: Joined) -> TokenLayout:
        """The one layout that new tokens have at all sizes."""
        roots = [joined.operand] + ([self._output(joined.past)] if joined.past is not None else [])
        numbers = whole_numbers(self.step, roots, stop=lambda var: var in self.news)
        possible: list[TokenLayout] | None = None
        for calls in self._call_pairs(joined, numbers):
            fitting = self._compare(what, joined, calls)
            possible = fitting if possible is None else [layout for layout in possible if layout in fitting]
        if not possible:
            self._refuse(what, "the order of axes changes with the sizes")
        return possible[0]

    def _call_pairs(self, joined: Joined, numbers: set[int]) -> list[tuple[Case, Case]]:
        """Pairs of calls, the second after the first: small ones, and across every number."""
        if joined.past is None:
            return [(Case(0, 3), Case(0, 4))]
        pairs = [CALLS, FIRST_CALLS, SHORT_CALLS]
        pairs += [(Case(number - 2, 3), Case(number + 1, 4)) for number in sorted(numbers) if number > CALLS[1].total]
        pairs = [pair for pair in pairs if self.capacity is None or pair[1].total <= self.capacity]
        if not pairs:
            raise ModelError(f"{self.graph.source}: its cache of {self.capacity} tokens is too short to be checked")
        return pairs

    def _tags(self, shape: tuple[int, ...]) -> np.ndarray:
        first, self.next_tag = self.next_tag, self.next_tag + int(np.prod(shape))
        return np.arange(first, self.next_tag).reshape(shape)

    def _output(self, past: relax.Var) -> relax.Expr:
        return self.step.view.outputs[self.presents[past]]

    def _call(self, case: Case, joined: Joined, past: np.ndarray | None) -> Evaluation:
        """Begin a call; a past without a value gets tags, and so do all new tokens that are needed."""
        evaluation = self.step.evaluation(case)
        evaluation.keep_values = True
        roots = [joined.operand] + ([self._output(joined.past)] if joined.past is not None else [])
        for var in self.step.view.slice(roots, stop=lambda var: var in self.news):
            if var in self.news:
                evaluation.known[var] = self._tags(evaluation.shape(var))
            elif joined.past is not None and var.same_as(joined.past):
                evaluation.known[var] = self._tags(evaluation.shape(var)) if past is None else past
        return evaluation

    def _compare(self, what: str, joined: Joined, calls: tuple[Case, Case]) -> list[TokenLayout]:
        """The layouts that new tokens may have in both calls, behind what was there before."""
        self.next_tag, past, layouts, read = 1, None, [], []
        try:
            for case in calls:
                evaluation = self._call(case, joined, past)
                tensor = np.asarray(evaluation.value(joined.operand))
                if joined.past is not None:
                    past = np.asarray(evaluation.value(self._output(joined.past)))
                    if tensor.shape[1] < case.total:
                        why = f"attention reads {tensor.shape[1]} of {case.total} tokens: old ones are dropped"
                        self._refuse(what, why)
                layouts.append(possible_layouts(evaluation.known[joined.new], tensor[:, case.past : case.total]))
                read.append(tensor[:, : case.total])
        except Unevaluable as error:
            self._refuse(what, f"{error} stands in the way")
        if not all(layouts):
            self._refuse(what, "the new tokens are not behind the old ones as they are")
        if joined.past is not None and not np.array_equal(read[1][:, : calls[0].total], read[0]):
            self._refuse(what, "the second call does not read what the first one returned, as it was")
        return [layout for layout in layouts[0] if layout in layouts[1]]

    def _refuse(self, what: str, why: str) -> NoReturn:
        raise ModelError(
            f"{self.graph.source}: the cache of {what} is not its past joined with new tokens: {why}; caches that "
            "roll, rotate or drop tokens are not supported"
        )


def present_outputs(step: StepInputs) -> set[int]:
    """Outputs that some past's values reach."""
    pasts = set(step.roles.of(PAST, step.inputs))
    return {
        index
        for index, output in enumerate(step.view.outputs)
        if pasts.intersection(step.view.slice([output], stop=lambda var: step.view.op(var) in ATTENTION))
        or pasts.intersection(value_operands(output))
    }
