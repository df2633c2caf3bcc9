"""Prompts as users give them (text, token ids, conversations, one or many) to rows of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from rotquant_tvm.errors import UsageError
from rotquant_tvm.runtime.chat_template import Messages
from rotquant_tvm.runtime.token_rows import is_flat, token_row
from rotquant_tvm.runtime.tokenizer import TextTokenizer

Prompt: TypeAlias = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | np.ndarray
Chat: TypeAlias = bool | Messages | Sequence[Messages]


def prompt_rows(
    prompt: Prompt | None, chat: Chat, tokenizer: TextTokenizer | None, vocab_size: int
) -> tuple[list[np.ndarray], bool]:
    """Return one int32 row of token ids per prompt, and whether there was a single one, not in a list.

    ``prompt``: a text, token ids, or a list of either. ``chat``: True to wrap every text as a user's message,
    or, without ``prompt``, a conversation (list of messages) or a list of conversations. Raises UsageError
    for an empty prompt, text without a tokenizer, ids outside the vocabulary, or a prompt beside a
    conversation.
    """
    if isinstance(chat, bool | np.bool_):
        if prompt is None:
            raise UsageError("give a prompt, or a conversation as chat=[{'role': 'user', 'content': '…'}]")
        encoded, single = _from_prompt(prompt, bool(chat), tokenizer)
    elif prompt is not None:
        raise UsageError("give either a prompt or a conversation as chat=, not both")
    else:
        encoded, single = _from_conversations(chat, tokenizer)
    rows = [token_row(ids, vocab_size, index) for index, ids in enumerate(encoded)]
    empty = [index for index, row in enumerate(rows) if not len(row)]
    if empty or not rows:
        raise UsageError(f"prompt {empty[0]} is empty; give some text" if rows else "no prompt was given")
    return rows, single


def _from_prompt(
    prompt: Prompt, chat: bool, tokenizer: TextTokenizer | None
) -> tuple[Sequence[object], bool]:
    if isinstance(prompt, str):
        return [_encode(prompt, chat, tokenizer)], True
    if isinstance(prompt, Sequence) and prompt and all(isinstance(text, str) for text in prompt):
        return [_encode(str(text), chat, tokenizer) for text in prompt], False
    if chat:
        raise UsageError("chat=True takes prompts as text, not token ids")
    rows = prompt if isinstance(prompt, Sequence) else np.asarray(prompt)
    if isinstance(rows, bytes) or (isinstance(rows, np.ndarray) and rows.ndim == 0):
        raise UsageError(f"prompt {prompt!r}: expected a text, token ids, or a list of either")
    return ([rows], True) if len(rows) and is_flat(rows) else (list(rows), False)


def _from_conversations(
    chat: Messages | Sequence[Messages], tokenizer: TextTokenizer | None
) -> tuple[Sequence[object], bool]:
    text_tokenizer = _required(tokenizer)
    if not isinstance(chat, Sequence) or isinstance(chat, str) or not chat:
        raise UsageError("a chat is a list of messages like {'role': 'user', 'content': '…'}")
    if any(isinstance(message, Mapping) for message in chat):
        return [text_tokenizer.encode_chat(chat)], True  # type: ignore[arg-type]
    return [text_tokenizer.encode_chat(messages) for messages in chat], False  # type: ignore[arg-type]


def _encode(text: str, chat: bool, tokenizer: TextTokenizer | None) -> list[int]:
    text_tokenizer = _required(tokenizer)
    if chat:
        return text_tokenizer.encode_chat([{"role": "user", "content": text}])
    return text_tokenizer.encode(text)


def _required(tokenizer: TextTokenizer | None) -> TextTokenizer:
    if tokenizer is None:
        raise UsageError(
            "the artifact has no tokenizer; give token ids, or compile with the model's tokenizer"
        )
    return tokenizer
