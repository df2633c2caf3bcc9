"""The rotary embedding of an attention site, found by what it does to the heads."""

from __future__ import annotations

from tvm import relax

from .feature_probe import FeatureProbe
from .find_attention import AttentionSite
from .head_sources import HEADS_AXIS, HeadSource, Rotary


def site_rotary(probe: FeatureProbe, site: AttentionSite) -> Rotary | None:
    """Return the rotary embedding of a site's keys, else of its queries; None where it cannot be told.

    ``probe`` is of the function that ``site`` was found in. Pairs of dimensions that are mixed, but by nothing that
    is made of the positions (the function's second parameter) alone, are no rotary embedding.
    """
    ends = [(site.call.args[0], HEADS_AXIS["q"])]
    if site.key is not None:
        ends.insert(0, (site.key.new, HEADS_AXIS["k"]))
    for end, axis in ends:
        source = HeadSource.of(probe, end, axis) if isinstance(end, relax.Var) else None
        if source is not None:
            inside, leaves = probe.region(end)
            angles = probe.positions_dependent - probe.ids_dependent
            return source.rotary if angles.intersection((*inside, *leaves)) or not source.rotary.dims else None
    return None
