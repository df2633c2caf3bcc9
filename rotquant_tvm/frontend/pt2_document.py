"""The graph of a .pt2 file, before torch deserializes it.

torch evaluates the text of symbolic sizes, looks operators up by any path below ``torch`` and imports modules that
a description of nested inputs names. Here sizes may be arithmetic, operators PyTorch's own, and nested inputs
containers; the rest is refused.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from rotquant_tvm.errors import ModelError

_DEPTH = 120
_SYMBOL = re.compile(r"[a-z]{1,6}\d{1,9}")
_FUNCTIONS = {
    "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
    "IntTrueDiv", "FloatTrueDiv", "TruncToInt", "TruncToFloat", "ToFloat", "Identity",
    "Integer", "Rational", "Add", "Mul",
    "Max", "Min", "Abs", "floor", "ceiling", "And", "Or", "Not", "Eq", "Ne", "Lt", "Le", "Gt", "Ge",
}  # fmt: skip
_BINARY = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Div, ast.Mod)
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|higher_order|rotquant)\.\w+(\.\w+)?|torch\.sym_\w+|_operator\.\w+|math\.\w+"
)
_UNSAFE_OPERATORS = {"_operator.methodcaller", "_operator.attrgetter", "_operator.call", "torch.ops.aten.from_file"}
_CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
_TRANSFORMERS = re.compile(r"transformers\.(modeling_outputs\.\w+|cache_utils\.DynamicCache)")


def cleaned(path: Path, document: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return a program's document with its devices, guards and source lines left out, and the containers it names.

    Every device becomes the CPU. Raises ModelError for what torch would evaluate, import or run.
    """
    cleaner = _Cleaner(path)
    return cleaner.visit(document, "", 0), cleaner.containers


class _Cleaner:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.containers: set[str] = set()

    def visit(self, value: Any, key: str, depth: int) -> Any:
        if depth > _DEPTH:
            raise ModelError(f"{self.path} is nested more than {_DEPTH} levels deep")
        if isinstance(value, list):
            return [] if key == "guards_code" else [self.visit(part, key, depth + 1) for part in value]
        if isinstance(value, dict):
            return self._visit_object(value, key, depth)
        if isinstance(value, str):
            self._check_text(value, key)
        return value

    def _visit_object(self, value: dict[str, Any], key: str, depth: int) -> Any:
        if key in ("device", "as_device"):
            return {"type": "cpu", "index": None}
        if key == "metadata":  # where a node came from; torch parses some of it
            return {}
        if {"target", "inputs", "outputs"} <= value.keys():
            self._check_operator(value["target"])
        if "as_custom_obj" in value or "custom_obj" in value:
            raise ModelError(f"{self.path} takes an object that is no tensor; export a model of plain tensors")
        return {name: self.visit(part, name, depth + 1) for name, part in value.items()}

    def _check_text(self, text: str, key: str) -> None:
        if key == "expr_str":
            self._check_size(text)
        elif key == "as_operator":
            self._check_operator(text)
        elif key in ("in_spec", "out_spec", "treespec"):
            self._check_containers(text)

    def _check_operator(self, target: Any) -> None:
        if not isinstance(target, str) or not _OPERATOR.fullmatch(target) or target in _UNSAFE_OPERATORS:
            raise ModelError(
                f"{self.path} calls {str(target)[:80]!r}, which is not one of PyTorch's own operators; it is not "
                "supported"
            )

    def _check_size(self, text: str) -> None:
        """Allow symbols, numbers and functions of them; of powers, small ones of symbols, since others can be huge."""
        try:
            fine = len(text) <= 2000 and _is_arithmetic(ast.parse(text, mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            fine = False
        if not fine:
            raise ModelError(f"{self.path} has the size {text[:80]!r}, which is not arithmetic")

    def _check_containers(self, text: str) -> None:
        try:
            waiting = [json.loads(text)[1]] if text else []
            while waiting:
                spec = waiting.pop()
                kind, context = spec["type"], spec["context"]
                waiting += spec["children_spec"]
                if kind is None:
                    continue
                if kind not in _CONTAINERS and not _TRANSFORMERS.fullmatch(kind):
                    raise ModelError(
                        f"{self.path} takes or returns a {str(kind)[:80]!r}; export a model that takes and returns "
                        "tensors in tuples, lists and dicts"
                    )
                if "__enum__" in str(context):
                    raise ModelError(f"{self.path} describes its inputs with more than names and numbers")
                self.containers.add(kind)
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise ModelError(f"{self.path} has a damaged description of its inputs or outputs") from None


def _is_arithmetic(node: ast.expr) -> bool:
    """Whether an expression is made of numbers, symbols (``s0`` or ``Symbol('s0', integer=True)``) and functions."""
    match node:
        case ast.Constant(value=bool() | int() | float()):
            return True
        case ast.Name(id=name):
            return _SYMBOL.fullmatch(name) is not None
        case ast.BinOp(left=left, op=op, right=right):
            return isinstance(op, _BINARY) and _is_arithmetic(left) and _is_arithmetic(right)
        case ast.UnaryOp(operand=operand):
            return _is_arithmetic(operand)
        case ast.BoolOp(values=parts):
            return all(map(_is_arithmetic, parts))
        case ast.Compare(left=left, comparators=others):
            return all(map(_is_arithmetic, (left, *others)))
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=facts):
            return _SYMBOL.fullmatch(name) is not None and all(isinstance(f.value, ast.Constant) for f in facts)
        case ast.Call(func=ast.Name(id="Pow"), args=[ast.Call(func=ast.Name(id="Symbol")) as base, power], keywords=[]):
            return _is_arithmetic(base) and ast.unparse(power) in ("Integer(2)", "Integer(3)", "Integer(4)")
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]):
            return name in _FUNCTIONS and all(map(_is_arithmetic, parts))
    return False
