"""The data of a tokenizer: its JSON, the ids that end a generation, and the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.imported_model import TokenizerData

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
    own = tokenizer.eos_token_id
    ends = {own, _chat_end_id(tokenizer)}
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        ends.update(eos if isinstance(eos, (list, tuple)) else [eos])
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by purpose
        template = template.get("default")
    return TokenizerData(
        json=backend.to_str(),
        eos_token_ids=tuple(sorted((int(end) for end in ends if end is not None), key=lambda end: (end != own, end))),
        bos_token_id=tokenizer.bos_token_id,
        chat_template=template or None,
    )


def _chat_end_id(tokenizer: Any) -> int | None:
    """Find the special token that the chat template puts right after an assistant's message, or None."""
    if not tokenizer.chat_template:
        return None
    mark = "rotquantanswer"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # templates are programs and may refuse any chat; the configs' ids remain
        return None
    rest = text.partition(mark)[2].lstrip()
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    ends = [token for token in special if token and rest.startswith(token)]
    return special[max(ends, key=len)] if ends else None
