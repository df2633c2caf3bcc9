"""Choosing the next token from logits: greedy, temperature, nucleus (top-p)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rotquant_tvm.errors import DeviceError, UsageError


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn.

    ``temperature`` 0 takes the most likely token (the lowest id of equals), otherwise logits are divided by
    it. ``top_p`` in (0, 1] keeps the smallest set of most likely tokens that together reach it
    (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"). ``seed`` makes draws
    reproducible; None takes fresh entropy. Raises UsageError for values outside.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise UsageError(f"temperature is {self.temperature!r}, expected 0 or a positive number")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UsageError(f"top_p is {self.top_p!r}, expected a number above 0 and at most 1")
        if self.seed is not None and (not isinstance(self.seed, int | np.integer) or self.seed < 0):
            raise UsageError(f"seed is {self.seed!r}, expected an integer from 0 on, or None")


GREEDY = SamplingConfig()


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the probabilities, float64 [vocab], of logits [vocab] at a temperature above 0."""
    shifted = (logits.astype(np.float64) - logits.max()) / temperature
    weights = np.exp(shifted)
    probabilities: np.ndarray = weights / weights.sum()
    return probabilities


def nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Return the ids of the smallest set of most likely tokens whose probabilities reach ``top_p``.

    Ordered from the most likely on, the lower id first among equals; never empty.
    """
    order = np.argsort(-probabilities, kind="stable")
    cumulative = np.cumsum(probabilities[order])
    count = int(np.searchsorted(cumulative, top_p * cumulative[-1], side="left")) + 1
    return order[:count]


class Sampler:
    """Draws the tokens of one sequence.

    Every sequence of a batch has a stream of its own, derived from the seed and its number, so what
    a sequence draws does not depend on its neighbours.
    """

    def __init__(self, config: SamplingConfig, sequence: int = 0) -> None:
        self.config, self.sequence = config, sequence
        entropy = None if config.seed is None else [int(config.seed), sequence]
        self._random = np.random.Generator(np.random.PCG64(entropy))

    def choose(self, logits: np.ndarray) -> int:
        """Return the next token for logits float [vocab]; raises DeviceError if they hold NaN or +Inf."""
        best = int(np.argmax(logits))
        if not np.isfinite(logits[best]):  # argmax finds a NaN first, then the largest
            raise DeviceError(
                f"the model's logits hold {logits[best]} in sequence {self.sequence}; check the weights and the target"
            )
        if self.config.temperature == 0:
            return best
        probabilities = softmax(logits, self.config.temperature)
        if self.config.top_p == 1:
            return _draw(probabilities, self._random)
        kept = nucleus(probabilities, self.config.top_p)
        return int(kept[_draw(probabilities[kept], self._random)])


def _draw(weights: np.ndarray, random: np.random.Generator) -> int:
    """Draw an index with probability proportional to its weight, by the inverse distribution function."""
    cumulative = np.cumsum(weights)
    total = cumulative[-1]
    point = min(random.random() * total, np.nextafter(total, 0))
    return int(np.searchsorted(cumulative, point, side="right"))
