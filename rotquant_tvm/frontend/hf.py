"""Loading of a transformers model and its tokenizer from a directory or a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rotquant_tvm.errors import ModelError, RotQuantError
from rotquant_tvm.frontend.error_text import is_panic
from rotquant_tvm.frontend.imported_model import TokenizerData
from rotquant_tvm.frontend.quiet import first_line, quiet
from rotquant_tvm.frontend.size_limits import check_layer_counts, modules_within
from rotquant_tvm.frontend.tokenizer import has_tokenizer, tokenizer_data
from rotquant_tvm.frontend.weight_index import check_weight_index

_REMEDY = "pip install 'rotquant-tvm[torch]'"
_FILES_ALONE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Nothing from the network, and no code of the model's own: transformers would ask on a terminal whether to run it."""


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model in memory and its tokenizer's data."""

    model: PreTrainedModel
    tokenizer: TokenizerData | None


def load(path: Path, dtype: torch.dtype) -> LoadedModel:
    """Load a directory (config.json and safetensors) or a .gguf file; never from the network.

    Raises ModelError for anything else, a damaged file, and a model that is not a causal decoder.
    """
    if path.is_dir():
        return _load_directory(path, dtype)
    if not path.exists():
        raise ModelError(f"{path} does not exist; give a model directory or a .gguf file")
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"{path} is not a model; give a directory with config.json or a .gguf file")
    return _load_gguf(path, dtype)


def _load_directory(path: Path, dtype: torch.dtype) -> LoadedModel:
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(f"{path} has no config.json; give a directory that holds a transformers model")
    try:
        declared = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(declared, dict) or "model_type" not in declared:
        raise ModelError(f"{file} names no model_type")
    model_type = declared["model_type"]
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ModelError(f"{file}: transformers does not know the model type {str(model_type)[:80]!r}")
    check_layer_counts(file, declared)
    check_weight_index(path)
    check_decoder(_attempt(path, lambda: AutoConfig.from_pretrained(path, **_FILES_ALONE)))
    stored = sum(entry.stat().st_size for entry in path.iterdir() if entry.is_file())
    with modules_within(path, stored, "directory"):
        model = _load_model(path, {"pretrained_model_name_or_path": path}, dtype)
    return LoadedModel(model, _load_tokenizer(path, {}, model) if has_tokenizer(path) else None)


def _load_gguf(path: Path, dtype: torch.dtype) -> LoadedModel:
    try:
        from rotquant_tvm.frontend.gguf_file import parsed_once, read_summary
    except ImportError as error:
        raise ModelError(f"reading {path} needs the package gguf: {_REMEDY}") from error
    summary = read_summary(path)
    arguments = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with parsed_once(), modules_within(path, path.stat().st_size, "gguf"):
        model = _load_model(path, arguments, dtype)
        tokenizer = _load_tokenizer(path, arguments, model) if summary.has_tokenizer else None
    return LoadedModel(model, tokenizer)


def _load_model(path: Path, arguments: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Load the weights; transformers fills missing ones with random numbers, so those are refused."""
    model: PreTrainedModel
    model, report = _attempt(
        path,
        lambda: AutoModelForCausalLM.from_pretrained(
            **arguments, **_FILES_ALONE, dtype=dtype, output_loading_info=True
        ),
    )
    check_decoder(model.config)
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{path} lacks the weight {missing[0]!r}{more}")
    return model


def _load_tokenizer(path: Path, arguments: dict[str, Any], model: PreTrainedModel) -> TokenizerData:
    arguments = {"pretrained_model_name_or_path": path, **arguments}
    tokenizer = _attempt(path, lambda: AutoTokenizer.from_pretrained(**arguments, **_FILES_ALONE))
    data: TokenizerData = _attempt(path, lambda: tokenizer_data(tokenizer, model))
    return data


def check_decoder(config: Any) -> None:
    """Refuse an encoder-decoder by its config."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{config.model_type!r} is an encoder-decoder; only decoder-only models are supported"
        )


def _attempt(path: Path, load_part: Callable[[], Any]) -> Any:
    """Run a step of transformers quietly; any failure becomes one line."""
    try:
        with quiet():
            return load_part()
    except RotQuantError:
        raise
    except ImportError as error:
        raise ModelError(f"{path} cannot be loaded: {first_line(error)} ({_REMEDY})") from error
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ModelError(f"{path} cannot be loaded: {first_line(error)}") from error
