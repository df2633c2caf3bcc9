"""Importers: model sources to a Relax module whose attention is kept whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rotquant_tvm.errors import ModelError, UsageError
from rotquant_tvm.frontend.imported_model import ImportedModel, TokenizerData

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["ImportedModel", "TokenizerData", "from_config", "from_torch", "import_model"]

DTYPES = ("float32", "float16")


def import_model(
    source: str | os.PathLike[str] | PreTrainedModel, *, dtype: str = "float32", every_logit: bool = False
) -> ImportedModel:
    """Import a decoder model: a transformers model object, its directory, or a .gguf file.

    ``dtype`` ("float32" or "float16") is that of the weights and the past when they come from files; a model
    object keeps its own. ``every_logit``: the step returns the logits after every token, [batch, seq, vocab],
    for measuring how well it predicts a text; sessions need the ordinary form. Nothing is read from the network.
    Raises UsageError for another dtype, ModelError for a source that cannot be imported or when an optional
    package is missing.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not isinstance(source, (str, os.PathLike)):
        return from_torch(source, every_logit=every_logit)
    require_torch()
    import torch

    from rotquant_tvm.frontend.hf import load
    from rotquant_tvm.frontend.torch_import import import_torch_model

    loaded = load(Path(source), getattr(torch, dtype))
    return import_torch_model(loaded.model, loaded.tokenizer, every_logit)


def from_torch(model: PreTrainedModel, *, every_logit: bool = False) -> ImportedModel:
    """Import a transformers causal LM from memory, in its own dtype; the tokenizer is None.

    ``every_logit`` as of ``import_model``. The model is left as it was, and its weights are shared. Raises
    ModelError if it cannot be imported.
    """
    require_torch()
    from rotquant_tvm.frontend.torch_import import import_torch_model

    return import_torch_model(model, None, every_logit)


def from_config(config: PretrainedConfig, *, dtype: str = "float16") -> ImportedModel:
    """Import a causal LM of a transformers configuration, of which nothing but the weights' shapes exists.

    The result's ``weights`` are None: they are given when the compiled library is put on a device. Raises UsageError
    for a ``dtype`` other than "float32" and "float16", ModelError if the model cannot be made or imported.
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
