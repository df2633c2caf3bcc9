"""The data of a tokenizer: its JSON, the ids that end a generation, and the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.imported_model import TokenizerData
from rotquant_tvm.frontend.tokenizer_files import chat_end, token_ids

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory holds any tokenizer file."""
    return any((directory / name).is_file() for name in _FILES)


def tokenizer_data(tokenizer: Any, model: Any) -> TokenizerData:
    """Collect the data of a transformers tokenizer, with the ending ids that ``model``'s configs name.

    Raises ModelError for a tokenizer without a JSON form (one that only exists in Python).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} has no tokenizer.json form; save a fast tokenizer beside it"
        )
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by purpose
        template = template.get("default")
    template = template if isinstance(template, str) and template else None
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    own = tokenizer.eos_token_id
    ends = {own, chat_end(backend, template, tokens)} - {None}
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ends |= token_ids(getattr(config, "eos_token_id", None))
    return TokenizerData(
        json=backend.to_str(),
        eos_token_ids=tuple(sorted(ends, key=lambda end: (end != own, end))),
        bos_token_id=tokenizer.bos_token_id,
        chat_template=template,
    )
