"""Why something that looks like attention is none, or none that ``R.nn.attention`` can say."""

from __future__ import annotations


class Mismatch(Exception):
    """The dataflow is not that of attention: ``operator`` broke the match, for ``reason``; ``depth`` operators in."""

    def __init__(self, operator: str, reason: str, depth: int = 0) -> None:
        super().__init__(f"{operator}: {reason}")
        self.operator = operator
        self.reason = reason
        self.depth = depth
