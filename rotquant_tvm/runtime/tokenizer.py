"""Text to token ids and back: ``tokenizer.json``, the chat template, and text that arrives token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

from rotquant_tvm.errors import ArtifactError, UsageError
from rotquant_tvm.runtime.chat_template import ChatTemplate, Messages
from rotquant_tvm.runtime.manifest import TokenizerSpec

_CONTEXT = 6  # prompt tokens decoded before the first new one, so that its leading space is kept
_MAX_HELD = 16  # tokens without a complete character, after which they can only be invalid UTF-8


class TextTokenizer:
    """The tokenizer of an artifact.

    Raises ArtifactError if ``tokenizer_json`` is no tokenizer or the chat template is not valid.
    """

    def __init__(self, tokenizer_json: str, spec: TokenizerSpec) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(
                f"tokenizer.json is not a tokenizer ({error}); compile the model again"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.spec = spec
        self._chat = None
        if spec.chat_template is not None:
            self._chat = ChatTemplate(spec.chat_template, self._special_tokens())

    def _special_tokens(self) -> dict[str, str]:
        ids = {"bos_token": self.spec.bos_token_id, "eos_token": next(iter(self.spec.eos_token_ids), None)}
        tokens = {
            name: self._tokenizer.id_to_token(token) for name, token in ids.items() if token is not None
        }
        return {name: token for name, token in tokens.items() if token is not None}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, with the special tokens that the model opens a text with.

        An empty text is the BOS token alone. Raises UsageError if the model has none.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=True).ids
        if ids:
            return ids
        if self.spec.bos_token_id is None:
            raise UsageError(
                "the prompt is empty and the model has no BOS token to start from; give some text"
            )
        return [self.spec.bos_token_id]

    def encode_chat(self, messages: Messages) -> list[int]:
        """Return the token ids of a conversation, up to where the assistant's next turn begins.

        Raises UsageError if the artifact has no chat template or the template refuses the messages.
        """
        if self._chat is None:
            raise UsageError("the artifact has no chat template; pass the prompt as plain text, without chat")
        text = self._chat.render(messages)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return text

    def stream(self, prompt_ids: Sequence[int] = ()) -> TextStream:
        """Return a decoder for tokens that follow ``prompt_ids`` one by one."""
        return TextStream(self, prompt_ids)


class TextStream:
    """Decodes tokens as they come, never cutting a character in two.

    Text is released when it no longer ends in an incomplete UTF-8 sequence, and also when too many tokens
    are held for the sequence ever to become complete; ``finish`` releases the rest.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = [int(token) for token in prompt_ids[-_CONTEXT:]]
        self._read = len(self._window)

    def push(self, token: int) -> str:
        """Take one token and return the text that is certain by now, possibly empty."""
        self._window.append(int(token))
        before, text = self._texts()
        undecided = text.endswith("\ufffd") or len(text) <= len(before)
        if undecided and len(self._window) - self._read < _MAX_HELD:
            return ""
        return self._release(before, text)

    def finish(self) -> str:
        """Return what was held back, incomplete characters as U+FFFD."""
        return self._release(*self._texts())

    def _release(self, before: str, text: str) -> str:
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._window[: self._read]), decode(self._window)
