"""Generating text: prefill the prompts, then decode token by token until every sequence has ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from rotquant_tvm.errors import UsageError
from rotquant_tvm.runtime.sampling import GREEDY, Sampler, SamplingConfig
from rotquant_tvm.runtime.stopping import StopMatcher, stop_strings

if TYPE_CHECKING:
    from rotquant_tvm.runtime.library import CompiledLibrary
    from rotquant_tvm.runtime.session import Session

FinishReason: TypeAlias = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class GenerationConfig:
    """When a generation ends and how tokens are drawn.

    ``max_tokens``: most new tokens per sequence, None for as many as the cache holds. ``stop``: texts that
    end a sequence; they are not part of its text. Raises UsageError for values outside.
    """

    max_tokens: int | None = 128
    stop: tuple[str, ...] = ()
    sampling: SamplingConfig = GREEDY

    def __post_init__(self) -> None:
        stop_strings(self.stop)
        limit = self.max_tokens
        number = isinstance(limit, int | np.integer) and not isinstance(limit, bool)
        if limit is not None and (not number or limit < 1):
            raise UsageError(f"max_tokens is {limit!r}, expected 1 or more, or None for all that fit")


@dataclass(frozen=True)
class TextChunk:
    """One new token of one sequence.

    ``text`` is what is certain to be shown with it: empty while a character or a possible stop string is
    incomplete. ``finish_reason`` is set with the sequence's last token.
    """

    sequence: int
    token: int
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Generation:
    """A finished sequence.

    ``ids``: all new tokens, the EOS included; ``text``: what they say, without special tokens and up to
    the stop string (empty if the artifact has no tokenizer); ``finish_reason``: ``eos``, ``stop`` (a stop
    string) or ``length`` (``max_tokens`` or the end of the cache).
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


class GenerationStream(Iterator[TextChunk]):
    """Generates while it is iterated over; ``results`` holds the sequences once it has ended.

    At any time the cache holds the prompts and all new tokens but the last of each sequence, which has not
    been fed yet, so a stream may be left early.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[np.ndarray],
        config: GenerationConfig,
        reset: bool = True,
        single: bool = False,
    ) -> None:
        """Check that prompts (int32 rows) and new tokens fit; nothing runs before the first token is wanted.

        ``reset``: forget what the session holds first; otherwise the prompts continue its sequences.
        ``single``: a note for the caller that the one prompt did not come in a list. Raises UsageError for
        a wrong number of prompts or stop strings without a tokenizer, KVCacheFull if they do not fit.
        """
        self.single = single
        if config.stop and session.library.tokenizer is None:
            raise UsageError(
                "stop strings need a tokenizer and the artifact has none; compile with the tokenizer"
            )
        if not reset and len(prompts) != session.batch:
            raise UsageError(
                f"{len(prompts)} prompts cannot continue the {session.batch} sequences of the session"
            )
        session.library.check_batch(len(prompts))
        start = np.zeros(len(prompts), np.int64) if reset else session.lengths.astype(np.int64)
        filled = start + [len(row) for row in prompts]
        session.check_room(filled + (config.max_tokens or 1) - 1)
        room = session.capacity - filled + 1
        self._sequences = [
            _Sequence(index, row, config.max_tokens or int(room[index]), config, session.library)
            for index, row in enumerate(prompts)
        ]
        self._chunks = self._generate(session, prompts, reset)

    def __next__(self) -> TextChunk:
        return next(self._chunks)

    @property
    def results(self) -> list[Generation]:
        """The sequences in the order of the prompts; raises UsageError before the stream has ended."""
        if any(sequence.finish_reason is None for sequence in self._sequences):
            raise UsageError("the generation has not ended; iterate to its end first")
        return [sequence.result() for sequence in self._sequences]

    def _generate(self, session: Session, prompts: Sequence[np.ndarray], reset: bool) -> Iterator[TextChunk]:
        if reset:
            session.reset(batch=len(prompts))
        logits = session.prefill(list(prompts))
        active = np.ones(len(prompts), bool)
        while True:
            for sequence in self._sequences:
                if active[sequence.index]:
                    yield sequence.extend(logits[sequence.index])
            active = np.array([sequence.finish_reason is None for sequence in self._sequences])
            if not active.any():
                return
            logits = session.decode([sequence.ids[-1] for sequence in self._sequences], active)


class _Sequence:
    """One sequence while it grows."""

    def __init__(
        self, index: int, prompt: np.ndarray, limit: int, config: GenerationConfig, library: CompiledLibrary
    ) -> None:
        self.index = index
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._prompt_ids = tuple(int(token) for token in prompt)
        self._limit = limit
        self._eos = library.eos_token_ids
        self._sampler = Sampler(config.sampling, index)
        self._matcher = StopMatcher(config.stop)
        self._decoder = library.tokenizer.stream(self._prompt_ids) if library.tokenizer else None
        self._text: list[str] = []

    def extend(self, logits: np.ndarray) -> TextChunk:
        """Draw the next token from logits [vocab] and see whether the sequence ends with it."""
        token = self._sampler.choose(logits)
        self.ids.append(token)
        text = ""
        if token in self._eos:
            self.finish_reason = "eos"
        else:
            text = self._matcher.push(self._decoder.push(token) if self._decoder else "")
            if len(self.ids) == self._limit:
                self.finish_reason = "length"
        if self.finish_reason is not None and self._decoder:
            text += self._matcher.push(self._decoder.finish())
        if self._matcher.matched is not None:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            text += self._matcher.finish()
        self._text.append(text)
        return TextChunk(self.index, token, text, self.finish_reason)

    def result(self) -> Generation:
        """Return the finished sequence."""
        assert self.finish_reason is not None
        return Generation(self._prompt_ids, tuple(self.ids), "".join(self._text), self.finish_reason)
