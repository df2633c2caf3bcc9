"""Needle prompts: their length, where the needle lies, what is fed as the question."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from rotquant_tvm.errors import ModelError, UsageError
from rotquant_tvm.evaluation.needle import DEPTHS, answers, needle_prompts, retrieved

TEXT = " ".join(f"word{i % 7} of sentence {i}." if i % 3 else f"more{i} words" for i in range(900))


@pytest.fixture(params=[False, True], ids=["plain", "chat"])
def tokenizer(request, tokenizers):
    return tokenizers(opens=True, chat=request.param)


def test_prompts_hide_their_key_at_every_depth(tokenizer):
    prompts = needle_prompts(TEXT, tokenizer, 900, trials=3)
    assert Counter(prompt.depth for prompt in prompts) == {depth: 3 for depth in DEPTHS}
    assert len({prompt.key for prompt in prompts}) > 10
    places = {}
    for prompt in prompts:
        assert 880 <= len(prompt.ids) <= 900
        text = tokenizer.decode(prompt.ids)
        assert text.count(prompt.key) == 1 and text.endswith("The magic number is")
        assert ("assistant:" in text) == (tokenizer.spec.chat_template is not None)
        places.setdefault(prompt.depth, []).append(text.index(prompt.key))
    means = [np.mean(places[depth]) for depth in DEPTHS]
    assert all(np.diff(means) > 80)


def test_the_question_is_the_prompts_end_and_gives_nothing_away(tokenizer):
    for prompt in needle_prompts(TEXT, tokenizer, 700, trials=1):
        question = tokenizer.decode(prompt.ids[-prompt.question_tokens :])
        assert "What is the magic number" in question and prompt.key not in question and len(question) < 120


def test_prompts_are_drawn_anew_and_repeatably(tokenizer):
    first, again = (needle_prompts(TEXT, tokenizer, 600, 2) for _ in range(2))
    assert first == again != needle_prompts(TEXT, tokenizer, 600, 2, seed=1)


def test_lengths_that_cannot_be_filled_are_refused(tokenizer):
    with pytest.raises(UsageError, match="too short"):
        needle_prompts(TEXT, tokenizer, 100, 1)
    with pytest.raises(ModelError, match="too short to fill"):
        needle_prompts("A few words.", tokenizer, 900, 1)


@pytest.mark.parametrize(
    ("answer", "found"), [(" 4711.", True), ("4711", True), (" 47112", False), (" 12, no, 4711", False), ("", False)]
)
def test_only_the_first_number_counts(answer, found):
    assert retrieved(answer, "4711") is found


def test_text_and_question_go_in_one_after_the_other(tokenizer):
    prompts = needle_prompts(TEXT, tokenizer, 500, trials=1)
    fed = []

    class FakeSession:
        def prefill(self, rows):
            fed.append(rows)

        def generate(self, rows, max_tokens, reset):
            assert max_tokens == 12 and reset is False
            fed.append(rows)
            return [SimpleNamespace(text=str(len(row))) for row in rows]

    def session(batch, capacity):
        assert batch == len(prompts) and capacity >= max(len(prompt.ids) for prompt in prompts) + 12
        return FakeSession()

    found = answers(SimpleNamespace(session=session), prompts)
    assert [(*head, *tail) for head, tail in zip(*fed, strict=True)] == [prompt.ids for prompt in prompts]
    assert found == [str(prompt.question_tokens) for prompt in prompts]
