"""The order of trials: the rule first, no kernel twice, a bounded number, and neighbours of the best at the end."""

from __future__ import annotations

import math

import pytest
from rotquant_tvm.schedules.knobs import chosen_knobs

from rotquant_tvm.tuning import knob_search
from rotquant_tvm.tuning.knob_search import KnobSearch
from rotquant_tvm.tuning.tuning_task import TuningTask

SPACE = {"a": (1, 2, 4, 8, 16), "b": (0, 1, 2, 3), "c": (5,)}


class FakeTask(TuningTask):
    """A task whose space is ``SPACE``."""

    @property
    def knobs(self):
        return SPACE


@pytest.fixture
def searching(task, monkeypatch):
    """A search whose kernels are their knobs; ``declined`` and ``same`` change which exist and which are equal."""

    def make(trials=16, declined=lambda knobs: False, kernel=lambda knobs: tuple(sorted(knobs.items())), **options):
        monkeypatch.setattr(knob_search, "kernel_for", lambda func, _: None if declined(chosen_knobs(func)) else func)
        monkeypatch.setattr(knob_search, "without_choice", lambda func: kernel(chosen_knobs(func)))
        monkeypatch.setattr(knob_search.tvm_ffi, "structural_hash", hash)
        return KnobSearch(FakeTask(task.definition, task.target, task.bucket), trials, **options)

    return make


def run(search, seconds, batch=4):
    """Answer until nothing more is asked; returns all that was asked, in order."""
    asked = []
    while batch_of := search.ask(batch):
        for knobs in batch_of:
            asked.append(knobs)
            search.tell(knobs, seconds(knobs))
    return asked


def valley(knobs):
    """Best at a=8, b=2; the rule's own is in between."""
    return abs(math.log2(knobs["a"]) - 3) + abs(knobs["b"] - 2) if knobs else 2.5


@pytest.mark.parametrize("trials", [1, 2, 7, 16, 100])
def test_the_rule_comes_first_and_nothing_twice(searching, trials):
    asked = run(searching(trials), valley)
    assert asked[0] == {} and len(asked) == min(trials, 1 + 20)
    keys = {tuple(sorted(knobs.items())) for knobs in asked}
    assert len(keys) == len(asked)
    assert all(set(knobs) == set(SPACE) and all(v in SPACE[n] for n, v in knobs.items()) for knobs in asked[1:])


def test_promising_choices_come_next_and_then_neighbours_of_the_best(searching, monkeypatch):
    first = ({"a": 1, "b": 0, "c": 5}, {"a": 4, "b": 2, "c": 5}, {"a": 16, "b": 3, "c": 5})
    monkeypatch.setattr(FakeTask, "promising", first, raising=False)
    asked = run(searching(8), valley, batch=1)
    assert asked[:4] == [{}, *first]
    assert {"a": 8, "b": 2, "c": 5} in asked[4:]
    for number, knobs in enumerate(asked[4:], 4):  # each is a step from one before
        assert any(sum(knobs[name] != other[name] for name in SPACE) == 1 for other in asked[1:number])


def test_choices_that_a_rule_declines_cost_no_trial(searching):
    asked = run(searching(16, declined=lambda knobs: knobs.get("a", 0) > 2), valley)
    assert len(asked) == 1 + 2 * 4 and all(knobs["a"] <= 2 for knobs in asked[1:])


def test_choices_that_give_the_same_kernel_cost_no_trial(searching):
    """A kernel that has no room for more than two stages is the same with four."""
    asked = run(searching(100, kernel=lambda knobs: (min(knobs.get("a", 4), 4), knobs.get("b", 0))), valley)
    assert len(asked) == 3 * 4  # the rule's own is one of them


def test_a_rule_that_raises_declines(searching, monkeypatch):
    search = searching(4)

    def fail(func, _):
        raise ValueError("too large") if chosen_knobs(func).get("b") else AssertionError

    monkeypatch.setattr(knob_search, "kernel_for", fail)
    assert search.ask(4) == []


def test_the_last_trials_are_neighbours_of_the_best(searching):
    asked = run(searching(12), valley, batch=3)
    random, last = asked[:8], asked[-1]
    best = min(random[1:], key=valley)
    seen = [knobs for knobs in asked[8:] if sum(knobs[name] != best[name] for name in SPACE) == 1]
    assert seen and last
    assert min(valley(knobs) for knobs in asked) <= valley(best)


def test_early_stopping_counts_trials_without_a_new_best(searching):
    asked = run(searching(16, early_stopping=3), lambda knobs: 1.0 if not knobs else 2.0, batch=1)
    assert len(asked) == 4


def test_failures_count_as_trials(searching):
    asked = run(searching(6), lambda knobs: math.inf)
    assert len(asked) == 6


def test_an_interrupted_search_goes_on(searching):
    """What was measured is not measured again, but the rule's own, which the others' results are compared with."""
    first = searching(16)
    before = [knobs for _ in range(2) for knobs in first.ask(3)]
    second = searching(16)
    second.seconds = {tuple(sorted(knobs.items())): valley(knobs) for knobs in before}
    assert second.unfinished()
    after = run(second, valley)
    assert after[0] == {} and len(after) == 1 + 16 - len(before)
    assert not [knobs for knobs in after[1:] if knobs in before]


def test_a_finished_search_is_finished(searching):
    search = searching(6)
    run(search, valley)
    again = searching(6)
    again.seconds = dict(search.seconds)
    assert not again.unfinished() and again.ask(4) == []
    assert searching(8).unfinished()


def test_the_order_is_the_seeds(searching):
    orders = [run(searching(10, seed=seed), valley) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
