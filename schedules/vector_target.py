"""What the schedules need to know of a CPU: how wide a vector register is, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.target import Target
from tvm.target.codegen import target_has_features


@dataclass(frozen=True)
class VectorTarget:
    """Vector registers of an llvm target.

    ``lanes`` is how many float32 fit into one register, ``registers`` how many the instruction set names.
    """

    lanes: int
    registers: int

    @property
    def tile(self) -> int:
        """Output features that a packed weight keeps together: two registers, see :mod:`.linear_llvm`."""
        return 2 * self.lanes

    @classmethod
    def of(cls, target: Target) -> VectorTarget:
        """Read the registers off the target's features; an unknown CPU counts as 16 registers of 128 bits.

        (``llvm_get_vector_width`` answers 512 for every x86, so it is no help here.)
        """
        if target_has_features("avx512f", target):
            return cls(lanes=16, registers=32)
        if target_has_features("avx2", target):
            return cls(lanes=8, registers=16)
        triple = str(target.attrs.get("mtriple", ""))
        return cls(lanes=4, registers=32 if triple.startswith(("aarch64", "arm64")) else 16)
