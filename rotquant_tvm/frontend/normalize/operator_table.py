"""What the tables of NumPy operators share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Operator = Callable[..., Any]
"""Takes the call's attributes and its arguments: arrays, lists for tuples, tuples of ints for shapes, numbers."""


class Unevaluable(Exception):
    """Something that cannot be evaluated in NumPy; the message names it."""


def axes_of(attrs: Any, name: str = "axis") -> tuple[int, ...] | None:
    """An attribute that is a list of axes, one axis or nothing."""
    value = getattr(attrs, name)
    if value is None:
        return None
    return tuple(int(axis) for axis in value) if hasattr(value, "__len__") else (int(value),)


def axis_of(attrs: Any) -> int | None:
    """The attribute ``axis`` where it is one axis or nothing."""
    return None if attrs.axis is None else int(attrs.axis)
