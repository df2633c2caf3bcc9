"""Importers: model sources to a Relax module whose attention is kept whole."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotquant_tvm.errors import ModelError, UsageError
from rotquant_tvm.frontend.imported_model import ImportedModel, TokenizerData
from rotquant_tvm.frontend.source_format import source_format

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.nn import Module
    from transformers import PretrainedConfig

__all__ = ["ImportedModel", "TokenizerData", "from_config", "from_torch", "import_model"]

DTYPES = ("float32", "float16", "bfloat16")


def import_model(
    source: str | os.PathLike[str] | Module | ExportedProgram, *, dtype: str = "float32", every_logit: bool = False
) -> ImportedModel:
    """Import a decoder: a directory, a .gguf, .onnx or .pt2 file, or an object as of ``from_torch``.

    ``dtype`` ("float32", "float16" or "bfloat16") is that of the weights and the past when they come from a directory
    or a .gguf file; other sources keep their own. ``every_logit``: the step returns the logits after every token,
    [batch, seq, vocab], as ``Session.verify`` of what is compiled from it does. Nothing is read from the network, and
    of a .pt2 file nothing is run or unpickled.
    Raises UsageError for another dtype, ModelError for a source that cannot be imported or when an optional
    package is missing.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not isinstance(source, (str, os.PathLike)):
        return from_torch(source, every_logit=every_logit)
    if source_format(Path(source)) == "onnx":
        from rotquant_tvm.frontend.onnx_import import import_onnx

        return import_onnx(Path(source), dtype=dtype, every_logit=every_logit)
    require_torch()
    if source_format(Path(source)) == "pt2":
        from rotquant_tvm.frontend.torch_program import import_saved_program

        return import_saved_program(Path(source), every_logit)
    import torch

    from rotquant_tvm.frontend.hf import load
    from rotquant_tvm.frontend.torch_import import import_torch_model

    loaded = load(Path(source), getattr(torch, dtype))
    return import_torch_model(loaded.model, loaded.tokenizer, every_logit)


def from_torch(
    model: Module | ExportedProgram,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    every_logit: bool = False,
) -> ImportedModel:
    """Import a decoder from memory, in its own dtype; the tokenizer is None.

    ``model``: a transformers causal LM; a program of ``torch.export``, with past keys and values in and out, with a
    cache of fixed length in buffers or inputs, or without a cache; or any other module whose ``forward`` is such a
    step, which is exported with ``example_inputs`` (a tuple of its arguments, or a dict of them by name) and
    ``dynamic_shapes`` (as of ``torch.export.export``; None lets torch find out which sizes vary). ``every_logit`` as
    of ``import_model``. The model is left as it was, and its weights are shared. Raises UsageError for example inputs
    where none belong, ModelError if the model cannot be imported.
    """
    require_torch()
    from torch.export import ExportedProgram
    from torch.nn import Module
    from transformers import PreTrainedModel

    if isinstance(model, ExportedProgram):
        from rotquant_tvm.frontend.torch_program import import_program

        if example_inputs is not None or dynamic_shapes is not None:
            raise UsageError("an exported program takes neither example_inputs nor dynamic_shapes: it has its own")
        return import_program(model, "exported program", every_logit=every_logit)
    if example_inputs is not None and isinstance(model, Module):
        from rotquant_tvm.frontend.torch_program import import_program
        from rotquant_tvm.frontend.torch_program_module import export_module

        program = export_module(model, example_inputs, dynamic_shapes)
        return import_program(program, type(model).__name__, every_logit=every_logit)
    if isinstance(model, Module) and not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__} is not a transformers model; give its step's example_inputs with it, or export it "
            "with torch.export"
        )
    from rotquant_tvm.frontend.torch_import import import_torch_model

    return import_torch_model(model, None, every_logit)


def from_config(config: PretrainedConfig, *, dtype: str = "float16") -> ImportedModel:
    """Import a causal LM of a transformers configuration, of which nothing but the weights' shapes exists.

    The result's ``weights`` are None: they are given when the compiled library is put on a device. Raises UsageError
    for a ``dtype`` other than those of ``import_model``, ModelError if the model cannot be made or imported.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    require_torch()
    import torch

    from rotquant_tvm.frontend.shape_model import shape_model
    from rotquant_tvm.frontend.torch_import import import_torch_model

    return import_torch_model(shape_model(config, getattr(torch, dtype)), None, with_weights=False)


def require_torch() -> None:
    """Check that torch and transformers can be imported."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"importing a PyTorch model needs the package {error.name!r}: pip install 'rotquant-tvm[torch]'"
        ) from error
