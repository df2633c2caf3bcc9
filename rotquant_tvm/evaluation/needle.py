"""Needle in a haystack: a number hidden at some depth of a long text, and a question for it at the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rotquant_tvm.errors import ModelError, UsageError
from rotquant_tvm.evaluation.windows import encode_plain
from rotquant_tvm.runtime.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from rotquant_tvm.runtime import CompiledLibrary

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the needle lies, as a share of the filler before it."""
ANSWER_TOKENS = 12
DEFINITION = (
    "A sentence with a number of {digits} digits stands at one of {depths} depths of the text; the question for it "
    "follows. The prompt up to the question is prefilled, then the question, then the answer is generated greedily: "
    "both read the text from the cache. Retrieved: the first number of the answer is that one."
)
_DIGITS = 4
_NEEDLE = " The magic number is {key}. "
_INTRODUCTION = "Below is a text. Remember the magic number in it.\n\n"
_QUESTION = "\n\nWhat is the magic number in the text above?"
_REPLY = "The magic number is"


@dataclass(frozen=True)
class NeedlePrompt:
    """One prompt: its ``ids``, how many of them are the question (``question_tokens``), and the ``key`` hidden."""

    ids: tuple[int, ...]
    question_tokens: int
    key: str
    depth: float


def definition() -> str:
    """Return what is done and counted."""
    return DEFINITION.format(digits=_DIGITS, depths=len(DEPTHS))


def needle_prompts(text: str, tokenizer: TextTokenizer, length: int, trials: int, seed: int = 0) -> list[NeedlePrompt]:
    """Build ``trials`` prompts per depth of at most ``length`` tokens each, filler and key drawn from ``seed``.

    A model with a chat template gets the text as a user's message and the beginning of the answer as its own. Raises
    UsageError if ``length`` leaves no room for filler, ModelError if the text is too short to fill it.
    """
    words = text.split()
    rng = np.random.default_rng([seed, length])
    prompts = []
    for depth in DEPTHS:
        for _ in range(trials):
            key = "".join(str(digit) for digit in rng.integers(1, 10, _DIGITS))
            start = int(rng.integers(0, max(1, len(words) - length)))
            prompts.append(_prompt(words[start : start + length], tokenizer, length, key, depth))
    return prompts


def _prompt(words: list[str], tokenizer: TextTokenizer, length: int, key: str, depth: float) -> NeedlePrompt:
    """Use as many of the words as fit."""
    question = _encoded(tokenizer, [], key, depth, empty=True)

    def ids(count: int) -> list[int]:
        return _encoded(tokenizer, words[:count], key, depth)

    least, most = 0, len(words)
    if len(ids(0)) > length:
        raise UsageError(f"a needle prompt takes {len(ids(0))} tokens without any filler; {length} is too short")
    if len(ids(most)) < length - 8:
        raise ModelError(f"the text is too short to fill {length} tokens")
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if len(ids(middle)) <= length else (least, middle)
    chosen = ids(least)
    tail = next(n for n in range(len(question) + 1) if n == len(question) or chosen[-1 - n] != question[-1 - n])
    return NeedlePrompt(tuple(chosen), tail, key, depth)


def _encoded(tokenizer: TextTokenizer, words: list[str], key: str, depth: float, empty: bool = False) -> list[int]:
    """Encode the whole prompt; ``empty``: without introduction, filler and needle."""
    at = round(depth * len(words))
    while 0 < at < len(words) and not words[at - 1].endswith("."):
        at += 1  # between sentences
    hay = " ".join(words[:at]) + _NEEDLE.format(key=key) + " ".join(words[at:])
    message = _QUESTION if empty else _INTRODUCTION + hay + _QUESTION
    if tokenizer.spec.chat_template is None:
        return tokenizer.encode(f"{message}\n{_REPLY}")
    return [*tokenizer.encode_chat([{"role": "user", "content": message}]), *encode_plain(_REPLY, tokenizer)]


def answers(library: CompiledLibrary, prompts: Sequence[NeedlePrompt]) -> list[str]:
    """Return what a library's cache makes of the prompts, greedily, all of one batch."""
    capacity = max(len(prompt.ids) for prompt in prompts) + ANSWER_TOKENS
    session = library.session(len(prompts), capacity)
    session.prefill([prompt.ids[: -prompt.question_tokens] for prompt in prompts])
    questions = [list(prompt.ids[-prompt.question_tokens :]) for prompt in prompts]
    generated = session.generate(questions, max_tokens=ANSWER_TOKENS, reset=False)
    assert isinstance(generated, list)
    return [each.text for each in generated]


def retrieved(answer: str, key: str) -> bool:
    """Whether the first number of an answer is that one."""
    found = re.search(r"\d+", answer)
    return found is not None and found.group() == key
