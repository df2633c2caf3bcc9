"""Cases of which the ordinary run takes some and ``-m full`` the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """All cases; those that are not ``chosen`` carry the mark ``full``."""
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.full) for case in cases]
