"""Suggestions for words that are not known."""

from __future__ import annotations

from rotquant_tvm.near_words import did_you_mean, near_words


def test_words_that_are_spelled_alike():
    assert near_words("compil", ("compile", "tune", "completion")) == ["compile", "completion"]
    assert near_words("CUDA", ("llvm", "cuda")) == ["cuda"] and near_words("vulkan", ("llvm", "cuda")) == []
    assert near_words("Sinks", ("SINKS",)) == ["SINKS"]  # as it is known, not as it was written
    assert near_words("sink", ("sinks", "recent"), alike=0.95) == [] and near_words("", ("a",)) == []
    assert len(near_words("rq", ["rq1", "rq2", "rq3", "rq4"])) == 3


def test_the_end_of_a_sentence():
    assert did_you_mean([]) == ""
    assert did_you_mean(["cuda"]) == "; did you mean cuda" and did_you_mean(["a", "b"]) == "; did you mean a or b"
