"""CachePolicy: sizes, and where tokens are after any sequence of calls."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.errors import UsageError

policies = st.builds(
    CachePolicy,
    sinks=st.integers(0, 40),
    recent=st.integers(0, 70),
    center=st.sampled_from([0, 32, 64, 96]),
    defer=st.integers(0, 90),
)


@given(policies, st.lists(st.tuples(st.booleans(), st.integers(1, 150)), max_size=12))
def test_every_token_has_a_place(policy, calls):
    """Behind the sinks a token is in a tile or in a slot of its own; blocks go whole, and recent tokens stay."""
    lengths = packed = np.zeros(1, np.int32)
    for chunk, count in calls:
        lengths = lengths + np.int32(count if chunk else 1)
        before, packed = packed, policy.packed_after(packed, lengths, chunk)
        if not policy.segmented:
            assert packed == lengths
            continue
        behind = max(int(lengths[0]) - policy.sinks, 0)
        assert before <= packed <= max(behind, int(before[0]))
        assert packed % policy.block == 0
        assert behind - packed <= policy.ring
        assert behind - packed >= min(policy.recent, behind) or packed == before
        assert packed <= 32 * policy.packed_tiles(int(lengths[0]))


@given(policies)
def test_a_name_reads_back(policy):
    assert CachePolicy.parse(policy.name) == policy
    assert policy.segmented == bool(policy.name)


def test_sizes():
    policy = CachePolicy(sinks=4, recent=8, center=64)
    assert (policy.block, policy.ring, policy.slots) == (64, 72, 76)
    assert [policy.packed_tiles(n) for n in (1, 75, 76, 139, 140)] == [2, 2, 2, 2, 4]
    straight = CachePolicy(sinks=4)
    assert (straight.block, straight.ring, straight.slots) == (1, 0, 4)
    assert [straight.packed_tiles(n) for n in (1, 36, 37)] == [1, 1, 2]


@pytest.mark.parametrize("options", [{"sinks": -1}, {"recent": 1.5}, {"center": 33}, {"defer": True}])
def test_numbers_that_make_no_sense(options):
    with pytest.raises(UsageError):
        CachePolicy(**options)


@pytest.mark.parametrize("digits", ["2147483648", "9" * 30, "9" * 5000])
def test_numbers_that_no_sequence_reaches_are_refused(digits):
    """Python itself refuses to read the longest of them."""
    with pytest.raises(UsageError, match="recent is beyond 2147483647"):
        CachePolicy.parse(f"recent={digits}")
    assert CachePolicy.parse("recent=00000000000007").recent == 7


def test_the_rows_of_16_bits_are_no_more_than_a_sequence_can_have():
    most = 2**31 - 1
    assert CachePolicy(sinks=most).slots == most
    with pytest.raises(UsageError, match=r"'sinks=2147483647,recent=2147483647' keep 4294967326 tokens .* 2147483647"):
        CachePolicy(sinks=most, recent=most)
