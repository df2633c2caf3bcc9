"""A text cut into windows of tokens, each a sequence of its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rotquant_tvm.errors import ModelError, UsageError
from rotquant_tvm.runtime.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Windows:
    """Token ids int32 [windows, context]; ``bos`` is the token that opens every window, or None."""

    ids: np.ndarray
    bos: int | None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return int(self.ids.shape[1])

    def digest(self, index: int) -> str:
        """Return the SHA-256 (hex) of one window's ids."""
        return hashlib.sha256(np.ascontiguousarray(self.ids[index], "<i4").tobytes()).hexdigest()


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file; raises ModelError if it cannot be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise ModelError(f"{path} holds no text")
    return text


def text_windows(text: str, tokenizer: TextTokenizer, tokens: int, context: int) -> Windows:
    """Cut the first ``tokens`` tokens of ``text`` into windows of ``context`` tokens; what is left over is dropped.

    The text is tokenized as a whole. If the tokenizer opens a text with BOS, every window opens with it, in the place
    of one token of the text, as llama.cpp does; models that know no BOS get none. Raises UsageError if a window has
    fewer than 2 tokens or does not fit into ``tokens``, ModelError if the text is shorter than one window.
    """
    bos = opening_token(tokenizer)
    body = context - (bos is not None)
    if body < 2 or tokens < context:
        raise UsageError(f"{tokens} tokens in windows of {context}: give at least one window, of 3 tokens or more")
    count = tokens // context
    ids = np.array(encode_plain(text, tokenizer)[: count * body], np.int32)
    if len(ids) < body:
        raise ModelError(f"the text has {len(ids)} tokens, fewer than one window of {context}; lower the context")
    rows = ids[: len(ids) // body * body].reshape(-1, body)
    if bos is not None:
        rows = np.concatenate([np.full((len(rows), 1), bos, np.int32), rows], axis=1)
    return Windows(np.ascontiguousarray(rows), bos)


def opening_token(tokenizer: TextTokenizer) -> int | None:
    """Return the BOS token if the tokenizer opens every text with it, else None."""
    bos = tokenizer.spec.bos_token_id
    return bos if bos is not None and tokenizer.encode("a")[:1] == [bos] else None


def encode_plain(text: str, tokenizer: TextTokenizer) -> list[int]:
    """Return the token ids of a text without an opening BOS."""
    ids = tokenizer.encode(text)
    return ids[1:] if opening_token(tokenizer) is not None else ids
