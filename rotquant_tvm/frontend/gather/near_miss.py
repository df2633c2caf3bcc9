"""What comes near attention without being gathered."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax


@dataclass(frozen=True)
class NearMiss:
    """Attention that stays spelled out.

    ``variable`` is the softmax's (or, where there is none, that of what takes its place), ``operator`` the one that
    broke the match, ``reason`` one line.
    """

    variable: relax.Var
    operator: str
    reason: str
