"""The check that every text of a model file is one: protobuf hands out damaged ones as bytes."""

from __future__ import annotations

from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor

from rotquant_tvm.errors import ModelError

_MAX_DEPTH = 100


def check_texts(message: Any, depth: int = 0) -> None:
    """Raise ModelError for a text of a message, or of one in it, that is not UTF-8. Tensors' values are not read."""
    if depth > _MAX_DEPTH:
        raise ModelError("its graphs are nested too deeply")
    if isinstance(message, onnx.TensorProto):
        _check("TensorProto.name", message.name)
        return
    for field, value in message.ListFields():
        repeated = hasattr(value, "__len__") and not isinstance(value, (str, bytes))
        values = value if repeated else [value]
        if field.type == FieldDescriptor.TYPE_STRING:
            for text in values:
                _check(f"{message.DESCRIPTOR.name}.{field.name}", text)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in values:
                check_texts(inner, depth + 1)


def _check(where: str, text: Any) -> None:
    if isinstance(text, bytes):
        raise ModelError(f"its {where} {text[:40]!r} is not UTF-8; the file is damaged")
