"""``--input-shapes``: which sizes of a decoder's inputs a compile fixes.

A decoder has one input of the caller's, ``ids`` [batch, seq]. Its batch may be fixed; -1 is dynamic.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .errors import UsageError

DYNAMIC = -1
INPUT = "ids"
_ENTRY = re.compile(r"([^\s:,\[\]]+)\s*:\s*\[([^\[\]]*)\]")
_SPELLING = "write them like ids:[1,-1], where -1 is dynamic"


def parse_input_shapes(text: str) -> dict[str, list[int]]:
    """Read ``"ids:[1,-1]"``, or several such entries with spaces or commas between; raises UsageError."""
    shapes: dict[str, list[int]] = {}
    if not text.strip() or _ENTRY.sub("", text).strip(" ,"):
        raise UsageError(f"cannot read the input shapes '{text}'; {_SPELLING}")
    for name, sizes in _ENTRY.findall(text):
        if name in shapes:
            raise UsageError(f"the input shapes name '{name}' twice; give it one shape")
        try:
            shapes[name] = [int(size) for size in sizes.split(",")] if sizes.strip() else []
        except ValueError:
            raise UsageError(f"cannot read the shape [{sizes}] of input '{name}'; {_SPELLING}") from None
    return shapes


def fixed_batch(shapes: Mapping[str, Sequence[int]] | None) -> int | None:
    """Return the batch that ``shapes`` fix, or None if it stays dynamic.

    Raises UsageError for another input than ``ids``, another rank than 2, a fixed sequence axis and sizes that
    are neither -1 nor 1 or more.
    """
    shapes = shapes or {}
    for name in shapes:
        if name != INPUT:
            raise UsageError(f"no input '{name}' can be given a shape; the model takes {INPUT} [batch, seq]")
    if INPUT not in shapes:
        return None
    sizes = shapes[INPUT]
    if len(sizes) != 2:
        raise UsageError(f"input {INPUT} is [batch, seq], of rank 2, not of rank {len(sizes)}; {_SPELLING}")
    for axis, size in zip(("batch", "seq"), sizes, strict=True):
        whole = isinstance(size, int) and not isinstance(size, bool)
        if not whole or (size < 1 and size != DYNAMIC):
            raise UsageError(f"input {INPUT}: {axis} is {size!r}; give -1 (dynamic) or a size of 1 or more")
    batch, seq = sizes
    if seq != DYNAMIC:
        raise UsageError(
            f"input {INPUT}: seq is fixed to {seq} and must be -1: prefill takes prompts of any length, and decode "
            "is a function of its own, for one token"
        )
    return None if batch == DYNAMIC else batch
