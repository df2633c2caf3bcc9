"""The operators of one attention, defined as the compiler's passes define them and compiled one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import tvm
from tvm import relax

from rotquant_tvm.codegen import compile_kernel
from rotquant_tvm.formats import Codec, Rotation
from rotquant_tvm.ops.append_plain import RowRotations
from rotquant_tvm.ops.site_shape import SiteShape
from rotquant_tvm.passes.kv_kernels import KernelLibrary
from rotquant_tvm.passes.lower_kv_ops import SPLITS
from rotquant_tvm.schedules import append_turned_cuda, attention_decode_cuda, attention_prefill_cuda
from rotquant_tvm.schedules.gpu_kv_kernels import gpu_kernel
from rotquant_tvm.schedules.knobs import RECORD_ATTR
from rotquant_tvm.schedules.vector_kv_kernels import HAND_LAID_ATTR, vector_kernel
from rotquant_tvm.tuning.apply_records import with_record
from rotquant_tvm.tuning.record_lookup import TuningRecords
from rotquant_tvm.tuning.shape_buckets import WantedSizes

DEFINITION = "definition"
"""What stands for a kernel's name where no rule had one."""


@dataclass(frozen=True)
class Operator:
    """A compiled operator: ``run`` takes the definition's arguments; ``rule`` names the hand-laid kernel.

    record  the tuning record that chose its knobs; empty if the rule alone did.
    """

    run: Callable[..., None]
    rule: str
    record: str = ""

    @property
    def label(self) -> str:
        """The rule, and whether it was tuned."""
        return self.rule + (", tuned" if self.record else "")


class OperatorLibrary:
    """Builds and compiles operators for ``target``, each once; definitions come from the passes' ``KernelLibrary``.

    Tuning records choose their knobs, as in a compile that knows the sizes ``wanted``.
    """

    def __init__(self, target: tvm.target.Target) -> None:
        self._target = target
        self._builder = relax.BlockBuilder()
        self._definitions = KernelLibrary(self._builder, target)
        self._records = TuningRecords(target)
        self._compiled: dict[tuple[str, str], Operator] = {}

    def rotate(self, rotation: Rotation, dtype: str) -> Operator | None:
        """``ops.rotate``; None for the identity, which the passes leave out."""
        if rotation.identity:
            return None
        return self._operator(self._definitions.rotate(rotation.structure, rotation.head_dim, dtype))

    def attention(self, shape: SiteShape, wanted: WantedSizes | None = None, tuned: bool = True) -> Operator:
        """Decode or prefill attention over packed tiles, in as many splits as the passes choose."""
        splits = max(1, SPLITS[self._target.kind.name] // shape.kv_heads)
        return self._operator(self._definitions.attention_packed(shape, splits), wanted, tuned)

    def rotating_attention(self, shape: SiteShape) -> SiteShape | None:
        """The decode attention that rotates queries and output itself, where the passes fuse these; else None."""
        codecs = shape.codecs()
        if self._target.kind.name != "cuda" or any(codec.rotation.identity for codec in codecs):
            return None
        fused = replace(shape, rotated=True)
        return fused if attention_decode_cuda.build(fused, self._target) is not None else None

    def rotating_prefill(self, shape: SiteShape) -> SiteShape | None:
        """The prefill attention that rotates for the past alone, where the passes fuse rotations; else None."""
        if self._target.kind.name != "cuda" or all(codec.rotation.identity for codec in shape.codecs()):
            return None
        fused = replace(shape, rotated=True)
        return fused if attention_prefill_cuda.build(fused, self._target) is not None else None

    def roundtrip(self, codec: Codec, dtype: str) -> Operator:
        """``ops.roundtrip``."""
        return self._operator(self._definitions.roundtrip(codec, dtype))

    def append(self, shape: SiteShape) -> Operator:
        """``ops.append``."""
        return self._operator(self._definitions.append(shape))

    def flush(self, shape: SiteShape, ordered: bool) -> Operator:
        """``ops.flush``."""
        return self._operator(self._definitions.flush(shape, ordered))

    def append_plain(self, shape: SiteShape, rotations: RowRotations | None = None) -> Operator:
        """``ops.append_plain``."""
        return self._operator(self._definitions.append_plain(shape, rotations))

    def rotating_rows(self, shape: SiteShape) -> RowRotations | None:
        """The rotations that the append of a single token does itself, where the passes fuse them; else None."""
        k, v = shape.codecs()
        rotations = k.rotation.structure, v.rotation.structure
        if self._target.kind.name != "cuda" or not any(rotations) or not shape.cache_policy.recent:
            return None
        kernel = append_turned_cuda.append_turned_kernel(shape, rotations, self._target, words=1)
        return rotations if kernel is not None else None

    def _operator(self, gvar: tvm.ir.GlobalVar, wanted: WantedSizes | None = None, tuned: bool = True) -> Operator:
        func = self._builder.get()[gvar]
        if tuned:
            func = with_record(func, self._records, wanted)
        record = str(func.attrs.get(RECORD_ATTR, ""))
        key = gvar.name_hint, record
        if key not in self._compiled:
            # As it is now: another lookup, which knows no sizes, would choose knobs for what is to have the rule's own.
            run = compile_kernel(func, self._target, aligned=True, tuned=False)
            self._compiled[key] = Operator(run, kernel_rule(func, self._target), record)
        return self._compiled[key]


def kernel_rule(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> str:
    """Name the hand-laid kernel that takes a definition's place on a target, ``"definition"`` if there is none."""
    find = gpu_kernel if target.kind.name == "cuda" else vector_kernel
    kernel = find(func, target)
    return DEFINITION if kernel is None else str(kernel.attrs[HAND_LAID_ATTR])
