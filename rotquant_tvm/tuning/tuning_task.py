"""One kernel to tune: a definition, the rule that lays it out, and the sizes to measure it at."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tvm import IRModule, tirx
from tvm.runtime import DataType
from tvm.s_tir.meta_schedule.arg_info import TensorInfo
from tvm.s_tir.meta_schedule.database import Workload
from tvm.target import Target

from ..benchmark.settings import BatchShape
from ..schedules.kernel_by_size import SIZES_ATTR
from ..schedules.knobs import KNOBS_ATTR, RECORD_ATTR, Knobs, kernel_for, knob_values, promising, rule_of
from ..schedules.model_kernels import LOOPS
from .arguments import Measurement, Parameter, measurable
from .kernel_hash import kernel_hash
from .kernel_shape import KERNEL_ATTR, KernelShape
from .model_functions import definition_of
from .shape_buckets import Bucket, bucket_label, default_buckets, shapes_in, size_names

MAIN = "main"
_LEAST_BYTES = 32 << 10
"""That loops must move to be worth a task: below that a launch costs more than the work."""


@dataclass(frozen=True)
class TuningTask:
    """A definition, with nothing chosen yet, at the sizes of a bucket."""

    definition: tirx.PrimFunc
    target: Target
    bucket: Bucket

    @cached_property
    def shape(self) -> KernelShape:
        """What the kernel is specialized on."""
        shape = KernelShape.of(self.definition)
        if shape is None:
            raise RuntimeError("a function that is no operator cannot be tuned")
        return shape

    @property
    def name(self) -> str:
        """The operator, its shape and the bucket in one line."""
        return " ".join(filter(None, (self.shape.operator, self.shape.label, bucket_label(self.bucket))))

    @cached_property
    def rule(self) -> str:
        """The rule's name."""
        return str(getattr(rule_of(self.definition, self.target), "__name__", ""))

    @cached_property
    def kernel_hash(self) -> str:
        """The hash of the rule's code."""
        rule = rule_of(self.definition, self.target)
        return kernel_hash(rule) if rule is not None else ""

    @cached_property
    def knobs(self) -> dict[str, tuple[int, ...]]:
        """The values that each knob may have that matters at the bucket."""
        rule = rule_of(self.definition, self.target)
        return knob_values(rule, self.bucket) if rule is not None else {}

    @cached_property
    def promising(self) -> tuple[Knobs, ...]:
        """The choices of these knobs to try first."""
        rule = rule_of(self.definition, self.target)
        return () if rule is None else tuple(choice for choice in promising(rule) if choice.keys() == self.knobs.keys())

    @cached_property
    def workload(self) -> IRModule:
        """The module that MetaSchedule knows the task by; buckets of one definition share it."""
        func = self.definition.with_attrs({"global_symbol": MAIN, KERNEL_ATTR: f"{self.rule}@{self.kernel_hash}"})
        return IRModule({MAIN: func})

    @cached_property
    def workload_document(self) -> list[str]:
        """The workload as MetaSchedule's database has it: its hash and its text."""
        number, text = Workload(self.workload).as_json()
        return [str(number), compact_text(str(text))]

    @property
    def sizes(self) -> list[Any]:
        """``args_info`` as the database has it."""
        return [info.as_json() for info in self.args_info]

    @cached_property
    def measurement(self) -> Measurement:
        """What the kernel is measured on."""
        found = shapes_in(self.definition, self.bucket)
        return Measurement(self.shape, tuple(Parameter(*parameter) for parameter in found))

    @property
    def args_info(self) -> list[TensorInfo]:
        """The parameters as MetaSchedule describes them; together with the workload they name the task."""
        return [TensorInfo(DataType(p.dtype), list(p.shape)) for p in self.measurement.parameters]

    def key(self) -> tuple[str, str, str]:
        """What two tasks have in common if one of them is enough."""
        return self.shape.operator, _text(self.shape.essence()), _text(self.bucket)


def tuning_tasks(
    definitions: Iterable[tirx.PrimFunc], target: Target, sequences: Sequence[BatchShape] = ()
) -> list[TuningTask]:
    """The tasks of these definitions: those whose kernels have knobs, at the buckets that matter, each once.

    ``sequences`` replace the default ones (``shape_buckets``). Operators come in their order, buckets within them.
    """
    tasks: dict[tuple[str, str, str], TuningTask] = {}
    for func in definitions:
        shape, rule = KernelShape.of(func), rule_of(func, target)
        if shape is None or not measurable(shape) or rule is None or not knob_values(rule):
            continue
        clean = without_choice(definition_of(func))
        if kernel_for(clean, target) is None:  # the rule declines: there is nothing to tune
            continue
        for bucket in default_buckets(shape, size_names(clean), target.kind.name, sequences):
            task = TuningTask(clean, target, bucket)
            if task.knobs and (shape.operator != LOOPS or task.measurement.moved_bytes() >= _LEAST_BYTES):
                tasks.setdefault(task.key(), task)
    return list(tasks.values())


def without_choice(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The definition without the name, knobs and record that it has got since it was made."""
    for name in (KNOBS_ATTR, SIZES_ATTR, RECORD_ATTR, "global_symbol"):
        if func.attrs is not None and name in func.attrs:
            func = func.without_attr(name)
    return func


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def compact_text(text: str) -> str:
    """A workload's text without the JSON's blanks, which are half of it: base64 of a length (uint64) and the JSON."""
    document = json.loads(base64.b64decode(text)[8:])
    compact = json.dumps(document, separators=(",", ":")).encode()
    return base64.b64encode(struct.pack("<Q", len(compact)) + compact).decode()
