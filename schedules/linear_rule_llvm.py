"""The rule for linear layers on CPUs: packed weights, and how many rows a micro kernel takes as a knob."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tvm import tirx
from tvm.target import Target

from rotquant_tvm.ops.linear import LinearShape
from rotquant_tvm.ops.model_op import model_properties

from .knobs import chosen_knobs
from .linear_llvm import PackedLinear, packed_linear
from .vector_target import VectorTarget

KNOBS: dict[str, tuple[int, ...]] = {"rows": (2, 3, 4, 6, 8, 12)}
"""``rows`` of sums that are held in registers."""


def knobs_at(bucket: Mapping[str, int]) -> tuple[str, ...]:
    """A single row has a kernel of its own."""
    return ("rows",) if math.prod(bucket.values()) > 1 else ()


def linear_shape(spec: PackedLinear) -> LinearShape:
    """What a kernel of ``packed_linear`` says of itself."""
    kept = (spec.in_features, spec.out_features, spec.bias, spec.residual, False, spec.leading)
    return LinearShape(*kept, spec.input_dtype, spec.weight_dtype, spec.output_dtype, spec.tile)


def linear_rule_llvm(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc | None:
    """Build the kernel with the knobs that a definition chose; None for a weight that is not packed."""
    shape = LinearShape.read(model_properties(func))
    if not shape.tile or shape.gated:
        return None
    kept = (shape.in_features, shape.out_features, shape.bias, shape.residual, shape.leading)
    spec = PackedLinear(*kept, shape.input_dtype, shape.output_dtype, shape.weight_dtype, shape.tile)
    kernel = packed_linear(spec, VectorTarget.of(target), chosen_knobs(func).get("rows"))
    return kernel.with_attrs(shape.attrs())
