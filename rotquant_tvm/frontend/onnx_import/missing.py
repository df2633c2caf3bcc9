"""One message for all nodes of a model that cannot be converted."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_NAMED = 5
"""Nodes named per operator and reason; the others are counted."""


@dataclass(frozen=True)
class Failure:
    """A node that cannot be converted: its ``operator`` ("com.microsoft.Foo (opset 1)"), ``name`` and ``reason``."""

    operator: str
    name: str
    reason: str

    @classmethod
    def of(cls, node: onnx.NodeProto, opset: int, reason: str) -> Failure:
        """Describe a node of the protobuf."""
        domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
        name = node.name or next((name for name in node.output if name), "")
        return cls(f"{domain}{node.op_type} (opset {opset})", name, reason)


def describe_failures(source: str, failures: list[Failure]) -> str:
    """All failures of a model, those of one operator and reason together, in one line."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for failure in failures:
        groups[failure.operator, failure.reason].append(failure.name)
    count = len({operator for operator, _ in groups})
    parts = []
    for (operator, reason), names in groups.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        listed = ", ".join(repr(name) for name in names[:_NAMED])
        parts.append(f"{operator}: {reason} (node{'s' * (len(names) > 1)} {listed}{more})")
    operators = "an operator" if count == 1 else f"{count} operators"
    return f"{source} uses {operators} that cannot be imported: " + "; ".join(parts)
