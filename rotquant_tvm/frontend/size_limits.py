"""Sizes that a model's configuration claims, held against the bytes of its weights before anything is made of them.

transformers makes a module for every layer that a configuration asks for, and fills weights that a file lacks with
random numbers; a damaged number would take all memory or hours.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module

from rotquant_tvm.errors import ModelError

MAX_LAYERS = 10_000
ELEMENTS_PER_BYTE = {"directory": 4, "gguf": 16}
"""How many elements a byte of a file can stand for: packed to 4 bits or to 1.6, and tied weights are counted twice."""

_SPARE_ELEMENTS, _SPARE_PARAMETERS, _BYTES_PER_PARAMETER = 1 << 20, 1000, 64
_BUFFER_ELEMENTS = 1 << 28
"""What tables of positions and masks may have in all: 16,384 x 16,384."""


def check_layer_counts(path: Path, config: Any) -> None:
    """Refuse a configuration, as JSON, with a number of layers beyond ``MAX_LAYERS``; some make lists of them."""
    waiting = [config]
    while waiting:
        part = waiting.pop()
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
        for name, value in part.items() if isinstance(part, dict) else ():
            if "layer" in name and isinstance(value, int | float) and not value <= MAX_LAYERS:
                raise ModelError(f"{path} says {name} = {str(value)[:30]}; at most {MAX_LAYERS} layers can be loaded")


@contextmanager
def modules_within(path: Path, stored_bytes: int, kind: str) -> Iterator[None]:
    """Refuse modules made inside with far more parameters than weights of ``stored_bytes`` can fill.

    ``kind``: a key of ``ELEMENTS_PER_BYTE``. Counted are parameters without memory, as transformers makes them before
    it loads. Raises ModelError.
    """
    thread = threading.get_ident()
    most = {
        "elements": _SPARE_ELEMENTS + ELEMENTS_PER_BYTE[kind] * stored_bytes,
        "parameters": _SPARE_PARAMETERS + stored_bytes // _BYTES_PER_PARAMETER,
        "elements of tables": _BUFFER_ELEMENTS,
    }
    counts = dict.fromkeys(most, 0)

    def count(what: str, number: int) -> None:
        counts[what] += number
        if counts[what] > most[what]:
            raise ModelError(
                f"{path} cannot be loaded: its configuration asks for more than {most[what]} {what}, and its weights "
                f"have {stored_bytes} bytes"
            )

    def parameter(_: torch.nn.Module, name: str, value: torch.nn.Parameter | None) -> None:
        if value is not None and value.is_meta and threading.get_ident() == thread:
            count("elements", value.numel())
            count("parameters", 1)

    def buffer(_: torch.nn.Module, name: str, value: torch.Tensor | None) -> None:
        if value is not None and threading.get_ident() == thread:
            count("elements of tables", value.numel())

    with ExitStack() as stack:
        stack.callback(module.register_module_parameter_registration_hook(parameter).remove)
        stack.callback(module.register_module_buffer_registration_hook(buffer).remove)
        yield
