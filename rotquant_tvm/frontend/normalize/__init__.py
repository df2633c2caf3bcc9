"""From a decoder's step as its source spells it to the canonical form (``normalize_step``)."""

from rotquant_tvm.frontend.normalize.normalize_step import normalize_step

__all__ = ["normalize_step"]
