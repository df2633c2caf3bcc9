"""How far back a crop may go, against a record of what stands in every place of a ring."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rotquant_tvm.cache_policy import NO_POLICY, CachePolicy
from rotquant_tvm.runtime.written_tokens import WrittenTokens
from rotquant_tvm.window_ring import WindowRing

POLICIES = [NO_POLICY, CachePolicy(sinks=4), CachePolicy(sinks=3, recent=2, center=64), CachePolicy(recent=7, defer=40)]


class Places:
    """The numbers behind the sinks of the tokens in a ring; a place gives up a block as another one begins there."""

    def __init__(self, ring: WindowRing) -> None:
        self.ring, self.numbers = ring, set()

    def write(self, first: int, stop: int) -> None:
        for number in range(first, stop):
            if number % self.ring.block == 0:
                old = (number - self.ring.tokens) // self.ring.block
                self.numbers = {n for n in self.numbers if n // self.ring.block > old}
            self.numbers.add(number)

    def held(self, length: int, packed: int) -> bool:
        """Whether the next token's window is there, as far as it lies in tiles."""
        sinks = self.ring.policy.sinks
        oldest = max(0, length - self.ring.window + 1 - sinks)
        return self.numbers.issuperset(range(oldest, min(packed, max(length - sinks, 0))))


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(1, 130),
    policy=st.sampled_from(POLICIES),
    steps=st.lists(st.tuples(st.integers(0, 300), st.booleans(), st.integers(0, 150)), min_size=1, max_size=6),
)
def test_what_is_possible_is_what_is_held(window, policy, steps):
    """After every chunk or token, a crop to any length is possible just where its window is still there."""
    ring = WindowRing(window, policy)
    written, places = WrittenTokens([ring], 1), Places(ring)
    length, packed = 0, 0
    for new, chunk, back in steps:
        length += new
        now = int(policy.packed_after(np.array([packed], np.int32), np.array([length], np.int32), chunk)[0])
        places.write(packed, now)
        packed = now
        written.note(np.array([length]), np.array([packed]))
        possible = written.possible(np.arange(length + 1)).tolist()
        assert possible == [places.held(n, packed) for n in range(length + 1)]
        assert possible[length] and (not new or possible[length - 1])
        shortest = int(written.shortest()[0])
        assert all(possible[shortest:])
        assert shortest <= policy.sinks + 1 or not possible[shortest - 1]
        keep = max(shortest, length - back)
        length, packed = keep, min(packed, max(keep - policy.sinks, 0))
        if packed == 0:
            places.numbers = set()
        written.restart(np.array([length]), np.array([packed]))


def test_sequences_are_chosen_with_what_was_written_of_them():
    written = WrittenTokens([WindowRing(40)], 2)
    written.note(np.array([200, 10]), np.array([200, 10]))
    assert written.shortest().tolist() == [167, 0]
    assert written.select([1, 0, 0]).shortest().tolist() == [0, 167, 167]
    assert [x.tolist() for x in written.counts()] == [[200, 10]] * 2
    assert WrittenTokens([], 2).counts() == [] and WrittenTokens([], 2).possible(np.array([3, 0])).all()


def test_a_layer_without_a_policy_bounds_one_that_keeps_sinks():
    """To a few sinks, which one layer keeps, the other one's window may not be there."""
    rings = [WindowRing(40, POLICIES[1]), WindowRing(40)]
    written = WrittenTokens(rings, 1)
    written.note(np.array([200]), np.array([196]))
    assert [bool(written.possible(np.array([n]))[0]) for n in (0, 3, 4, 171, 170)] == [True, False, False, True, False]
    assert written.always == 0 and WrittenTokens(rings[:1], 1).always == 4
