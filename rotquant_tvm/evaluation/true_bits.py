"""How many bits of memory an element of K or V takes at a length of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rotquant_tvm import report

if TYPE_CHECKING:
    from rotquant_tvm.runtime import CompiledLibrary


def true_bits(library: CompiledLibrary, tokens: int) -> float:
    """Return the bits per element of K and V of a sequence of ``tokens`` tokens, everything stored counted."""
    counted = getattr(report, "true_bits", None)
    if counted is not None:
        return float(counted(dict(library.info.document), tokens))
    return float(library.report["bits_per_element"])
