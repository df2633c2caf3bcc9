"""Masks: which of them are causal, or causal with a window, shown by what they compute.

What this shows. By structure: a mask is made of the padding mask, the positions, the sizes of the inputs and numbers
that the model holds, and of nothing else, so that no token's content changes it. By evaluation: at every case of
``cases_around`` it lets a real token see exactly the real tokens up to itself, or the last w of them, adds nothing to
their scores, and hides all others; w is read off and must be the same everywhere. What cases can and cannot show is
said in ``lengths``. Rows of padding are not compared (their outputs are read by nobody), nor is a mask with holes
between real tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from tvm import relax

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize.cases import Case, StepInputs, causal
from rotquant_tvm.frontend.normalize.evaluate import Evaluation
from rotquant_tvm.frontend.normalize.input_roles import IDS, MASK, OTHER, PADDING, PAST
from rotquant_tvm.frontend.normalize.lengths import LONGEST_UNCACHED, cases_around, whole_numbers
from rotquant_tvm.frontend.normalize.operator_table import Unevaluable
from rotquant_tvm.frontend.normalize.sites import Site, attribute

HIDDEN = -1e4
"""Scores at or below it hide a token: softmax gives it less than exp(-1e4) of the most visible one's weight."""

@dataclass
class ProvenMasks:
    """``windows``: one per site, None for plain causal; ``longest``: tokens up to which the masks go, None: any."""

    windows: list[int | None] = field(default_factory=list)
    longest: int | None = None


def prove_masks(step: StepInputs, sites: list[Site], source: str, capacity: int | None = None) -> ProvenMasks:
    """Show that every site is causal, with a window or none.

    ``capacity``: length of the source's own cache where that is fixed, and of its masks then. Raises ModelError
    naming the first site that is not, and what differs at which sizes.
    """
    for site in sites:
        _check_structure(step, site, source)
    numbers = whole_numbers(step, [site.mask for site in sites if site.mask is not None])
    numbers |= {window for site in sites if (window := attribute(site.call, "window_size")) is not None}
    cached = PAST in step.roles.kinds
    if not cached and (large := [number for number in numbers if number > LONGEST_UNCACHED]):
        raise ModelError(
            f"{source}: the masks depend on the length {min(large)}, and without a cache none above {LONGEST_UNCACHED} "
            "can be checked; export the model with past keys and values"
        )
    cases = cases_around(numbers, cached, capacity, PADDING in step.roles.kinds or MASK in step.roles.kinds)
    checks = [_SiteCheck(site, source, numbers, _reads_padding(step, site)) for site in sites]
    for case in cases:
        evaluation = step.evaluation(case)
        real = step.real(case)
        for check in checks:
            check.take(case, evaluation, real)
    limits = [check.longest for check in checks if check.longest is not None]
    return ProvenMasks([check.finish() for check in checks], min(limits, default=None))


def _check_structure(step: StepInputs, site: Site, source: str) -> None:
    """Refuse a mask made of anything but padding mask, positions, sizes and numbers of the model."""
    if site.mask is None:
        return
    kinds = dict(zip(step.inputs, step.roles.kinds, strict=True))
    names = {IDS: "the token ids", PAST: "a past key or value", OTHER: "an input of unknown role"}
    for var in step.view.slice([site.mask]):
        if kinds.get(var) in names:
            raise ModelError(
                f"{source}: the mask of {site.name} is computed from {names[kinds[var]]} ({var.name}); it cannot be "
                "shown to be causal"
            )


def _reads_padding(step: StepInputs, site: Site) -> bool:
    read = set(step.view.slice([site.mask])) if site.mask is not None else set()
    return any(param in read for kind in (PADDING, MASK) for param in step.roles.of(kind, step.inputs))


class _SiteCheck:
    """Compares one site's mask with what a causal one would be, case by case."""

    def __init__(self, site: Site, source: str, numbers: set[int], reads_padding: bool) -> None:
        self.site, self.source, self.numbers = site, source, numbers
        self.longest: int | None = None
        self.window: int | None = None
        self.reads_padding = reads_padding
        self.seen = 0

    def take(self, case: Case, evaluation: Evaluation, real: np.ndarray) -> None:
        """Check one case. Raises ModelError if the mask differs."""
        if self.longest is not None and case.total > self.longest:
            return
        if case.padding and not self.reads_padding:
            return  # padding is then seen, and the canonical form, which has none, is what the model computes without
        visible = self._visible(case, evaluation, real)
        if visible is None:
            return
        rows = real[:, case.past :]
        if not case.padding:
            self._read_window(case, visible)
        expected = causal(case, self.window)[None] & real[:, None]
        for head in range(visible.shape[1]):
            wrong = (visible[:, head] != expected) & rows[:, :, None]
            if wrong.any():
                self._refuse(case, visible[:, head], wrong)

    def _visible(self, case: Case, evaluation: Evaluation, real: np.ndarray) -> np.ndarray | None:
        """Which tokens the new ones see, bool [rows, heads, seq, total]; None beyond what the mask can serve."""
        call, total = self.site.call, case.total
        attribute_mask = _attribute_mask(call, case, evaluation, self._fail)
        if self.site.mask is None:
            return np.broadcast_to(attribute_mask, (len(real), *attribute_mask.shape[1:]))
        try:
            scores = np.asarray(evaluation.value(self.site.mask))
            length = evaluation.shape(call.args[1])[1]
            np.broadcast_shapes(scores.shape, (len(real), self.site.heads, case.seq, length))
        except (Unevaluable, ValueError) as error:
            self._limit(case, error)
            return None
        if length < total:
            self._fail(case, f"there are {length} keys for {total} tokens")
        hidden = scores <= HIDDEN
        strange = ~(hidden | (scores == 0))
        if strange.any():
            amount = float(scores[strange][0])
            self._fail(case, f"it adds {amount:.4g} to a score (biases by distance, as of ALiBi, are not supported)")
        heads = hidden.shape[1] if hidden.ndim == 4 else 1
        hidden = np.broadcast_to(hidden, (len(real), heads, case.seq, length))
        if not hidden[..., total:].all():
            self._fail(case, "it shows places of the cache that are not written yet")
        visible: np.ndarray = ~hidden[..., :total] & attribute_mask
        return visible

    def _limit(self, case: Case, error: Exception) -> None:
        """The mask cannot be evaluated: beyond a length written in the model that is the model's end."""
        ends = [number for number in self.numbers if 16 <= number < case.total]
        if not ends or not self.seen or case.padding:
            self._fail(case, f"it cannot be evaluated: {error}")
        self.longest = max(ends)
        if self.seen > self.longest:
            self._fail(case, f"it cannot be evaluated: {error}")

    def _read_window(self, case: Case, visible: np.ndarray) -> None:
        """Learn the window from a row that sees fewer tokens than are before it."""
        counts = visible.sum(-1).min(axis=(0, 1))
        for position, count in zip(range(case.past, case.total), counts, strict=True):
            if self.window is None and self.seen <= count <= position and count > 0:
                self.window = int(count)
        self.seen = max(self.seen, case.total)

    def _refuse(self, case: Case, visible: np.ndarray, wrong: np.ndarray) -> None:
        row, query, key = (int(place[0]) for place in np.nonzero(wrong))
        sees = "sees" if visible[row, query, key] else "does not see"
        kind = "causal" if self.window is None else f"causal with a window of {self.window}"
        self._fail(case, f"it is not {kind}: token {case.past + query} {sees} token {key}")

    def _fail(self, case: Case, what: str) -> None:
        raise ModelError(
            f"{self.source}: the mask of {self.site.name} cannot be replaced: {what} ({case.describe()}); only causal "
            "masks, with a window or none, and padding are supported"
        )

    def finish(self) -> int | None:
        """The window."""
        return self.window


def _attribute_mask(
    call: relax.Call, case: Case, evaluation: Evaluation, fail: Callable[[Case, str], None]
) -> np.ndarray:
    """What the operator's own attributes let see: bool [1, 1, seq, total]."""
    kind = str(call.attrs.causal_mask) if call.attrs.causal_mask is not None else ""
    if not kind:
        if len(call.args) <= 3:
            fail(case, "it sees all tokens, those after it included")
        return np.ones((1, 1, case.seq, case.total), bool)
    length = evaluation.shape(call.args[1])[1]
    first = length - case.seq if kind == "BottomRight" else 0
    distance = np.arange(first, first + case.seq)[:, None] - np.arange(length)
    visible = distance >= 0
    window = attribute(call, "window_size")
    if window is not None:
        visible &= distance < window
    if length < case.total:
        fail(case, f"there are {length} keys for {case.total} tokens")
    if visible[:, case.total :].any():
        fail(case, "it shows places of the cache that are not written yet")
    return visible[None, None, :, : case.total]
