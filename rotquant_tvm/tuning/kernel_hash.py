"""The hash of a rule's code, by which a tuning record tells that the kernel has changed since it was made."""

from __future__ import annotations

import ast
import hashlib
import importlib
import io
import sys
import tokenize
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ..formats import VERSION as LAYOUT_VERSION

DIGITS = 16
SCHEDULES = "rotquant_tvm.schedules"
_REGISTRIES = ("knobs", "model_kernels", "gpu_kv_kernels", "vector_kv_kernels")
"""Modules that know all rules and lay out nothing: through them every rule would count for every other."""
_SPACES = ("KNOBS", "PROMISING")
"""What tells a search what to choose from."""


def kernel_hash(rule: Callable[..., Any]) -> str:
    """Hash what lays out a rule's kernels: its module, the schedules that this one imports, and the tile's layout.

    Comments, docstrings, blank lines, the values in ``KNOBS`` and the choices in ``PROMISING`` do not count, nor do
    modules outside ``schedules`` and the lists of rules.
    """
    return _module_hash(rule.__module__)


@lru_cache(maxsize=64)
def _module_hash(name: str) -> str:
    digest = hashlib.sha256(f"layout {LAYOUT_VERSION}\n".encode())
    for module in sorted(_with_imports(name)):
        digest.update(f"{module.rpartition('.')[2]}\n{code_text(_source(module))}\n".encode())
    return digest.hexdigest()[:DIGITS]


def _with_imports(name: str) -> set[str]:
    """The module and all schedules that it imports, directly or not."""
    found, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += _imports(module)
    return found


def _imports(name: str) -> list[str]:
    package = SCHEDULES
    names = []
    for node in ast.walk(ast.parse(_source(name))):
        if isinstance(node, ast.ImportFrom):
            base = ("." * node.level) + (node.module or "")
            absolute = importlib.util.resolve_name(base, name.rpartition(".")[0]) if node.level else base
            names += [absolute, *(f"{absolute}.{alias.name}" for alias in node.names)]
    registries = {f"{package}.{registry}" for registry in _REGISTRIES}
    own = [module for module in names if module.startswith(f"{package}.") and _is_module(module)]
    return [module for module in own if module not in registries]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # an attribute of a module, no module
        return False


def _source(name: str) -> str:
    module: ModuleType = sys.modules.get(name) or importlib.import_module(name)
    return Path(str(module.__file__)).read_text(encoding="utf-8")


def code_text(source: str) -> str:
    """Python source without comments, docstrings, blank lines, trailing space and the values that knobs may have."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        for statement in getattr(node, "body", None) or () if not isinstance(node, ast.Lambda | ast.IfExp) else ():
            if _is_text(statement) or _is_space(statement):
                for row in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
                    lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _is_text(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _is_space(statement: ast.stmt) -> bool:
    """Whether a statement says which values knobs may have, or which come first: these make no other kernel."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return any(isinstance(target, ast.Name) and target.id in _SPACES for target in targets)
