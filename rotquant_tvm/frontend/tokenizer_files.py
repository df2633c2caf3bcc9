"""The tokenizer that lies beside a model as files, read without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from rotquant_tvm.errors import ModelError, RotQuantError
from rotquant_tvm.frontend.error_text import is_panic
from rotquant_tvm.frontend.imported_model import TokenizerData

_MAX_BYTES = 256 << 20


def folder_tokenizer(folder: Path) -> TokenizerData | None:
    """The tokenizer of a folder with ``tokenizer.json``; None without that file.

    Ids that end a generation come from ``tokenizer_config.json``, ``special_tokens_map.json``,
    ``generation_config.json``, ``config.json`` and ``genai_config.json``, and from what the chat template puts behind
    an answer. Raises ModelError for a file that cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    text = _read(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the package raises plain exceptions, and panics
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ModelError(f"{path} is no tokenizer: {str(error)[:200]}") from error
    own, names = _json(folder / "tokenizer_config.json"), _json(folder / "special_tokens_map.json")
    tokens = {
        key: _token(own.get(key) or names.get(key)) for key in ("eos_token", "bos_token", "unk_token", "pad_token")
    }
    template = _template(folder, own)
    eos = _id(tokenizer, tokens["eos_token"])
    ends = {eos, *_configured_ends(folder), chat_end(tokenizer, template, tokens)}
    return TokenizerData(
        json=text,
        eos_token_ids=tuple(sorted((end for end in ends if end is not None), key=lambda end: (end != eos, end))),
        bos_token_id=_id(tokenizer, tokens["bos_token"]),
        chat_template=template,
    )


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ModelError(f"{path} has more than {_MAX_BYTES} bytes, which no tokenizer needs")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        document = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return document if isinstance(document, dict) else {}


def _token(value: Any) -> str | None:
    """A special token, which files spell as text or as an object with its content."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _id(tokenizer: tokenizers.Tokenizer, token: str | None) -> int | None:
    return None if token is None else tokenizer.token_to_id(token)


def _template(folder: Path, own: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    template = _read(file) if file.is_file() else own.get("chat_template")
    if isinstance(template, list):  # several, by purpose
        named = [each for each in template if isinstance(each, dict)]
        template = next((each.get("template") for each in named if each.get("name") == "default"), None)
    return template if isinstance(template, str) and template else None


def _configured_ends(folder: Path) -> set[int]:
    documents = [_json(folder / name) for name in ("generation_config.json", "config.json", "genai_config.json")]
    documents += [part for document in documents for part in [document.get("model")] if isinstance(part, dict)]
    ends: set[int] = set()
    for document in documents:
        ends |= token_ids(document.get("eos_token_id"))
    return ends


def token_ids(entry: Any) -> set[int]:
    """The ids that an entry of a configuration names, one or a list; what is no id is left out."""
    named = entry if isinstance(entry, (list, tuple)) else [entry]
    return {end for end in named if type(end) is int and 0 <= end < 1 << 31}


def chat_end(tokenizer: tokenizers.Tokenizer, template: str | None, tokens: Mapping[str, str | None]) -> int | None:
    """The id of the special token that a chat template puts right behind an assistant's message, or None.

    ``tokens``: the special tokens by the names that templates know them by.
    """
    from rotquant_tvm.runtime.chat_template import ChatTemplate

    if template is None:
        return None
    mark = "rotquantanswer"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    try:
        known = {name: token for name, token in tokens.items() if token is not None}
        text = ChatTemplate(template, known).render(chat, add_generation_prompt=False)
    except RotQuantError:  # templates are programs and may refuse any chat; the configured ids remain
        return None
    rest = text.partition(mark)[2].lstrip()
    added = tokenizer.get_added_tokens_decoder()
    ends = [
        (token.content, index) for index, token in added.items() if token.content and rest.startswith(token.content)
    ]
    return max(ends, key=lambda end: len(end[0]))[1] if ends else None
