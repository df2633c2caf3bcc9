"""The next token: greedy, temperature and top-p against a plain reference and against their distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rotquant_tvm.errors import DeviceError, UsageError
from rotquant_tvm.runtime import SamplingConfig
from rotquant_tvm.runtime.sampling import Sampler, nucleus, softmax

logits_arrays = arrays(np.float32, st.integers(1, 30), elements=st.floats(-50, 50, width=32))


def reference_nucleus(probabilities, top_p):
    """Take tokens from the most likely on until they reach top_p."""
    ranked = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token))
    total, kept = 0.0, []
    for token in ranked:
        kept.append(token)
        total += float(probabilities[token])
        if total >= top_p * (1 - 1e-12):
            break
    return kept


@given(logits_arrays, st.floats(0.01, 0.99), st.floats(0.05, 10))
def test_nucleus_is_the_smallest_set_that_reaches_top_p(logits, top_p, temperature):
    probabilities = softmax(logits, temperature)
    kept = nucleus(probabilities, top_p)
    assert abs(probabilities.sum() - 1) < 1e-12
    mass = probabilities[kept].sum()
    assert mass >= top_p - 1e-9
    assert len(kept) == 1 or mass - probabilities[kept[-1]] < top_p + 1e-9
    assert probabilities[kept].min() >= np.delete(probabilities, kept).max(initial=0)
    if abs(np.cumsum(np.sort(probabilities)[::-1]) - top_p).min() > 1e-9:  # rounding decides ties of sums
        assert kept.tolist() == reference_nucleus(probabilities, top_p)


@given(logits_arrays, st.floats(0.05, 10))
def test_softmax_is_the_quotient_of_exponentials(logits, temperature):
    expected = [math.exp((float(value) - float(logits.max())) / temperature) for value in logits]
    np.testing.assert_allclose(softmax(logits, temperature), np.array(expected) / sum(expected), rtol=1e-12)


@given(logits_arrays)
def test_greedy_takes_the_first_of_the_largest(logits):
    assert Sampler(SamplingConfig()).choose(logits) == int(np.flatnonzero(logits == logits.max())[0])


@given(logits_arrays, st.floats(0.01, 1), st.integers(0, 1000))
def test_a_draw_stays_in_the_nucleus(logits, top_p, seed):
    token = Sampler(SamplingConfig(0.7, top_p, seed)).choose(logits)
    assert token in nucleus(softmax(logits, 0.7), top_p)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.5)])
def test_draws_follow_the_distribution(temperature, top_p):
    logits = np.array([0.0, 2.0, 1.0, -1.0, 1.5, -np.inf], np.float32)
    sampler = Sampler(SamplingConfig(temperature, top_p, seed=3))
    counts = np.bincount([sampler.choose(logits) for _ in range(20000)], minlength=6) / 20000
    weights = np.exp(logits.astype(np.float64) / temperature)
    weights /= weights.sum()
    kept = reference_nucleus(weights, top_p)
    expected = np.zeros(6)
    expected[kept] = weights[kept] / weights[kept].sum()
    assert np.abs(counts - expected).sum() < 0.03
    assert not counts[expected == 0].any()


def test_seeds_repeat_and_sequences_differ():
    logits = np.zeros(1000, np.float32)

    def draws(seed, sequence):
        sampler = Sampler(SamplingConfig(1.0, 1.0, seed), sequence)
        return [sampler.choose(logits) for _ in range(10)]

    assert draws(1, 0) == draws(1, 0) != draws(2, 0)
    assert draws(1, 0) != draws(1, 1)
    assert draws(None, 0) != draws(None, 0)


def test_tiny_temperatures_do_not_overflow():
    logits = np.array([1e4, 2e4, -1e4], np.float32)
    assert Sampler(SamplingConfig(1e-300)).choose(logits) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_logits_are_an_error(value):
    for temperature in (0.0, 1.0):
        with pytest.raises(DeviceError, match="logits hold"):
            Sampler(SamplingConfig(temperature)).choose(np.array([1.0, value, 2.0], np.float32))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"top_p": None},
        {"seed": -1},
        {"seed": 1.5},
    ],
)
def test_values_outside_are_refused(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        SamplingConfig(**values)
