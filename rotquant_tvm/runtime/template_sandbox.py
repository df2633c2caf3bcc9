"""The sandbox that chat templates run in: Jinja's, without operators that make huge values of small ones."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import jinja2
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LONGEST = 1 << 20
"""Elements of a repeated text or list."""

_BITS = 4096
_WIDTH = re.compile(r"%[^%a-zA-Z]*(\d{5}|\*)")


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Products, powers and formatting within bounds; beyond them a template is refused as one that fails."""

    intercepted_binops: ClassVar[frozenset[str]] = frozenset({"*", "**", "%"})  # type: ignore[misc]

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Compute ``left operator right``. Raises TemplateRuntimeError where the result could be huge."""
        if _is_huge(operator, left, right):
            raise jinja2.TemplateRuntimeError(f"the result of {operator!r} is too large")
        return super().call_binop(context, operator, left, right)


def _is_huge(operator: str, left: Any, right: Any) -> bool:
    if operator == "%":
        return isinstance(left, str) and _WIDTH.search(left) is not None
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        return (bits * right if operator == "**" else bits + right.bit_length()) > _BITS
    if operator == "*":
        pair = (left, right) if isinstance(right, int) else (right, left)
        return isinstance(pair[1], int) and hasattr(pair[0], "__len__") and len(pair[0]) * pair[1] > _LONGEST
    return False
