"""The lines of MetaSchedule's database as plain data: which knobs a trace chooses, times and sizes.

TVM itself rebuilds objects from such lines and trusts them: a line that refers to itself, or to nothing where there
must be something, ends the process. So nothing here is handed to TVM.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from ..schedules.knobs import Knobs
from .knob_space import ANNOTATION
from .log_document import MalformedLogError

FAILED_SECONDS = 1e10
"""What a candidate that failed is recorded with, as MetaSchedule does."""

_SAMPLE, _ANNOTATE, _BLOCK = "SampleCategorical", "Annotate", "GetSBlock"
_MOST_INSTRUCTIONS = 256


def check_workload(document: Any) -> None:
    """Check that a line is [hash, text]. Raises MalformedLogError."""
    texts = isinstance(document, list) and len(document) == 2 and all(isinstance(part, str) for part in document)
    if not texts or not document[0].isdecimal():
        raise MalformedLogError("a workload is no pair of hash and text")


def check_record(document: Any) -> None:
    """Check a record, [trace, seconds, target, sizes]. Raises MalformedLogError."""
    traced_knobs(document)
    run_seconds(document)
    sizes(document)


def traced_knobs(document: Any) -> Knobs:
    """The knobs that a record's trace writes on a definition; empty where it leaves all to the rule.

    Raises MalformedLogError, also for a trace that does anything else.
    """
    try:
        (instructions, decisions), *_ = document
        chosen = {int(number): int(decision) for number, decision in decisions}
        if len(instructions) > _MOST_INSTRUCTIONS:
            raise MalformedLogError("a trace has too many instructions")
        sampled: dict[str, int] = {}
        knobs: Knobs = {}
        for number, (kind, inputs, attrs, outputs) in enumerate(instructions):
            if kind == _SAMPLE:
                candidates = attrs[0]
                if not 0 <= chosen[number] < len(candidates) or not _integers(candidates):
                    raise MalformedLogError("a trace decides for what it has not")
                sampled[str(outputs[0])] = candidates[chosen[number]]
            elif kind == _ANNOTATE:
                name = str(attrs[0])
                if not name.startswith(ANNOTATION):
                    raise MalformedLogError(f"a trace annotates {name:.40}")
                knobs[name.removeprefix(ANNOTATION)] = sampled[str(inputs[1])]
            elif kind != _BLOCK:
                raise MalformedLogError(f"a trace has the instruction {kind!s:.40}")
    except MalformedLogError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise MalformedLogError(f"a trace cannot be read: {error}") from error
    return knobs


def run_seconds(document: Any) -> list[float]:
    """The times of a record. Raises MalformedLogError."""
    try:
        times = [float(seconds) for seconds in document[1] or ()]
    except (TypeError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise MalformedLogError(f"a record's times cannot be read: {error}") from error
    if not all(0 < seconds < math.inf for seconds in times):
        raise MalformedLogError("a record's times are no times")
    return times


def sizes(document: Any) -> list[list[Any]]:
    """The dtypes and shapes of a record, as ``TensorInfo.as_json`` gives them. Raises MalformedLogError."""
    try:
        found = [[str(kind), str(dtype), list(shape)] for kind, dtype, shape in document[3]]
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise MalformedLogError(f"a record's sizes cannot be read: {error}") from error
    if not all(_integers(shape) for _, _, shape in found):
        raise MalformedLogError("a record's sizes are no integers")
    return found


def typical_seconds(times: Sequence[Any] | None) -> float:
    """The median of a record's times, which other work on the machine does not move; ``math.inf`` for a failure."""
    found = [float(seconds) for seconds in times or ()]
    return statistics.median(found) if found and max(found) < FAILED_SECONDS else math.inf


def _integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and abs(value) < 2**63 for value in values)
