"""WindowRing: that what it says is held covers every window that can be asked for, by trying all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotquant_tvm.cache_policy import NO_POLICY, CachePolicy
from rotquant_tvm.window_ring import WindowRing

POLICIES = [NO_POLICY, CachePolicy(sinks=4), CachePolicy(recent=7), CachePolicy(sinks=3, recent=2, center=64)]
POLICIES.append(CachePolicy(sinks=1, recent=5, center=96, defer=40))


@pytest.mark.parametrize(
    ("window", "tiles"), [(1, 2), (31, 2), (32, 2), (33, 3), (40, 3), (64, 3), (65, 4), (4096, 129)]
)
def test_a_ring_has_the_windows_tiles_and_one_more(window, tiles):
    assert WindowRing(window).tiles == tiles and WindowRing(window).tokens == 32 * tiles


def test_blocks_of_a_policy_stay_whole():
    assert [WindowRing(w, POLICIES[3]).tiles for w in (1, 64, 65)] == [4, 4, 6]
    assert WindowRing(40, POLICIES[4]).tiles == 6 and WindowRing(40, POLICIES[1]).tiles == 3


def held_after(ring: WindowRing, written: int) -> dict[int, int]:
    """Number behind the sinks of the token at each place of the tiles, once tokens 0 … written - 1 went into them.

    Writing the first token of a block gives up the whole block that stood in its place.
    """
    places: dict[int, int] = {}
    for number in range(written):
        if number % ring.block == 0:
            old = (number - ring.tokens) // ring.block
            places = {place: n for place, n in places.items() if n // ring.block != old}
        places[number % ring.tokens] = number
    return places


@settings(max_examples=60, deadline=None)
@given(window=st.integers(1, 200), policy=st.sampled_from(POLICIES), written=st.integers(0, 900))
def test_what_is_held(window, policy, written):
    ring = WindowRing(window, policy)
    numbers = sorted(held_after(ring, written).values())
    first = int(ring.first_held(np.array([written]))[0])
    if numbers and numbers[0] > 0:
        assert first == numbers[0] + policy.sinks
    else:
        assert first == 0
    assert numbers == list(range(numbers[0], written)) if numbers else written == 0


@settings(max_examples=60, deadline=None)
@given(window=st.integers(1, 200), policy=st.sampled_from(POLICIES), length=st.integers(1, 900), chunk=st.booleans())
def test_a_sequence_can_always_go_on_and_lose_a_token(window, policy, length, chunk):
    """``shortest`` is exact: with one token less, the window would begin before what is held."""
    ring, lengths = WindowRing(window, policy), np.array([length], np.int32)
    written = policy.packed_after(np.zeros(1, np.int32), lengths, chunk)
    first, shortest = (int(x[0]) for x in (ring.first_held(written), ring.shortest(written)))
    assert shortest <= length - 1 or shortest == 0
    if shortest:
        assert shortest - window + 1 == first > 0
