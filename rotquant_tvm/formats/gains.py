"""Gain rules: the one fp16 stored per vector, computed once when it is written.

With y = R x unnormalized, ρ = ‖x‖, u = y/ρ and q = c[code] in the unit vector's domain:

    raw   ρ                          the norm itself
    norm  ρ/‖q‖                      keeps the norm (‖u‖ = 1)
    mse   ρ⟨u, q⟩/‖q‖² = ⟨y, q⟩/‖q‖²   least squared error
    ip    ρ/⟨u, q⟩ = ρ²/⟨y, q⟩         inner products unbiased
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
GainRule = Callable[[Array, Array, Array], Array]

HALF_MAX = 65504.0
"""The largest finite fp16 value; values, norms and gains saturate there."""

IP_FLOOR = 2.0**-20
"""The ip rule falls back to raw where ⟨u, q⟩ is not above this."""


def _raw(rho: Array, y: Array, q: Array) -> Array:
    return rho


def _norm(rho: Array, y: Array, q: Array) -> Array:
    gain: Array = rho / np.sqrt((q * q).sum(-1))
    return gain


def _mse(rho: Array, y: Array, q: Array) -> Array:
    gain: Array = (y * q).sum(-1) / (q * q).sum(-1)
    return gain


def _ip(rho: Array, y: Array, q: Array) -> Array:
    product = (y * q).sum(-1)
    usable = product > rho * rho.dtype.type(IP_FLOOR)
    return np.where(usable, rho * rho / np.where(usable, product, 1), rho)


GAIN_RULES: dict[str, GainRule] = {"raw": _raw, "norm": _norm, "mse": _mse, "ip": _ip}
"""The rules by name: (ρ [...], y [..., d], q [..., d]) -> gain [...], in the dtype of the operands."""


def half_gain(gain: Array) -> NDArray[np.float16]:
    """Round gains to fp16 after clipping them to [0, 65504]."""
    return np.clip(gain, 0.0, HALF_MAX).astype(np.float16)
