"""Which tasks a selection names, and what is wrong with one, as far as it can be told without the tasks."""

from __future__ import annotations

import pytest

from rotquant_tvm.errors import UsageError
from rotquant_tvm.tuning.task_selection import TaskSelection
from rotquant_tvm.tuning.task_sources import operators_of


def test_selection(gpu_tasks):
    def selected(text):
        return TaskSelection.parse(text).of(gpu_tasks)

    def numbers(text):
        return [gpu_tasks.index(task) for task in selected(text)]

    assert numbers("all") == list(range(len(gpu_tasks)))
    assert numbers("0,2-4") == [0, 2, 3, 4] and numbers("3, 1") == [1, 3]
    named = selected("Attention_Decode hurwitz2")
    assert named and all(t.name.startswith("attention_decode hurwitz2 ") for t in named)
    assert set(numbers("0,attention_decode")) >= {0, *numbers("attention_decode")}


@pytest.mark.parametrize("text", ["4-2", "1,3-0", "", ",", " , "])
def test_what_cannot_be_read_is_refused_without_the_tasks(text):
    with pytest.raises(UsageError, match="--tasks"):
        TaskSelection.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("999", "--tasks 999: there are tasks 0 to"),
        ("0-999", "--tasks 0-999: there are tasks 0 to"),
        ("9" * 5000, "no task has that in its name"),
        ("no such kernel", "--tasks no such kernel: no task has that in its name; see"),
        ("attention_decoder", "no task has that in its name; did you mean attention_decode"),
    ],
)
def test_selections_of_nothing_are_refused(gpu_tasks, text, said):
    with pytest.raises(UsageError, match=said):
        TaskSelection.parse(text).of(gpu_tasks)


def test_a_misspelled_operator_is_told_without_the_tasks(llvm, cuda):
    for target in (llvm, cuda):
        known = operators_of(target)
        assert {"attention_decode", "linear", "rotate"} <= known
        with pytest.raises(UsageError, match=r"--tasks atention_decode: .* did you mean attention_decode"):
            TaskSelection.parse("linear,atention_decode").check_names(known)
        with pytest.raises(UsageError, match="did you mean attention_decode"):
            TaskSelection.parse("attention-decode hurwitz3").check_names(known)
    for text in ("all", "0,2-4", "decode", "Attention_Decode hurwitz3", "rsqrt", "hurwitz3 32/8x128", "64→96"):
        TaskSelection.parse(text).check_names(known)  # of a loop's name or a shape's only a model can tell
