"""ApplyTuningRecords: the definitions of a module choose the knobs that tuning found best for them."""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.target import Target

from ..ops.model_op import model_op
from ..schedules.kernel_by_size import with_choices
from ..schedules.knobs import KNOBS_ATTR, RECORD_ATTR, kernel_for, knob_values, rule_of, with_knobs
from .model_functions import as_model_function
from .record_lookup import Match, TuningRecords
from .shape_buckets import WantedSizes, size_names


@tvm.transform.module_pass(opt_level=0, name="ApplyTuningRecords")
class ApplyTuningRecords:
    """Write the knobs of tuning records on the definitions that rules will lay out, and which record they are from.

    A definition without a record, or whose record the rule declines, is left to the rule. ``records.warnings`` says
    what could not be used, and which records are stale.
    """

    def __init__(
        self, target: Target | None = None, records: TuningRecords | None = None, wanted: WantedSizes | None = None
    ) -> None:
        """Set the target (None: the current one), its records (None: the user's and the packaged) and likely sizes."""
        self.target, self.records, self.wanted = target, records, wanted

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``mod``."""
        target = self.target or Target.current(allow_none=False)
        records = self.records or TuningRecords(target)
        result = tvm.IRModule(mod.functions, attrs=mod.attrs)
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc):
                known = as_model_function(func, str(gvar.name_hint)) or func
                tuned = with_record(known, records, self.wanted)
                if tuned is not known:
                    result.update_func(gvar, _laid_out(tuned, target))
        return result


def _laid_out(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc:
    """A definition for the rules that come later; a function of the model's own work as its rule builds it now."""
    kernel = kernel_for(func, target) if model_op(func) is not None else None
    return func if kernel is None else kernel


def with_record(func: tirx.PrimFunc, records: TuningRecords, wanted: WantedSizes | None = None) -> tirx.PrimFunc:
    """The definition with the knobs of its record and the record's name; itself where it has none or chose before.

    With those of its records at other sizes too, if it will see others, on targets whose kernels can tell them apart.
    """
    # A record that says that the rule's own knobs are best leaves no knobs, but its name.
    if func.attrs is None or KNOBS_ATTR in func.attrs or RECORD_ATTR in func.attrs:
        return func
    match = records.lookup(func, wanted)
    if match is None:
        return func
    operator = match.entry.record.operator
    tuned = with_knobs(func, match.knobs).with_attr(RECORD_ATTR, match.source)
    if not _takes(tuned, match, records.target):
        records.warnings.append(f"{operator}: the kernel does not take the record {match.source}; the rule decides")
        return func
    if match.stale:
        records.warnings.append(
            f"{operator}: the kernel has changed since the record {match.source}; tune it again with tvmc tune"
        )
    return _for_other_sizes(tuned, match, records, wanted) if wanted is not None and wanted.others else tuned


def _for_other_sizes(
    tuned: tirx.PrimFunc, match: Match, records: TuningRecords, wanted: WantedSizes
) -> tirx.PrimFunc:
    """The definition with what all records of its kernel choose; as it is if they choose the same."""
    if records.target.kind.name != "cuda" or model_op(tuned) is not None:
        return tuned
    names = set(size_names(tuned))
    matches = [each for each in records.at_other_sizes(tuned, match, wanted) if names <= set(each.entry.record.bucket)]
    if match not in matches:
        return tuned
    usable = [each for each in matches if each is match or _takes(with_knobs(tuned, each.knobs), each, records.target)]
    chosen = with_choices(tuned, [(dict(each.entry.record.bucket), each.knobs) for each in usable])
    if chosen is tuned:
        return tuned
    if any(each.stale for each in usable) and not match.stale:
        operator = match.entry.record.operator
        records.warnings.append(f"{operator}: the kernel has changed since some records; tune it again with tvmc tune")
    return chosen.with_attr(RECORD_ATTR, "; ".join(each.source for each in usable))


def _takes(func: tirx.PrimFunc, match: Match, target: Target) -> bool:
    """Whether the rule has a kernel for the record's knobs; of an exact and current record that is known."""
    rule = rule_of(func, target)
    values = knob_values(rule) if rule is not None else {}
    if any(value not in values.get(name, ()) for name, value in match.knobs.items()):
        return False
    if match.exact and not match.stale:
        return True
    try:
        return kernel_for(func, target) is not None
    except (ValueError, RuntimeError, AssertionError):  # a rule may also say no in this way
        return False
