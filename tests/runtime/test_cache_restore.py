"""A library function that fails midway over a cache with a policy: what is kept, and that all of it is still there.

The library here is NumPy: a token's number stands for its key and value, so that it can be looked up wherever the
policy says that it lies.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.errors import DeviceError
from rotquant_tvm.runtime.cache_arrays import CacheArrays
from rotquant_tvm.runtime.session import Session

VOCAB, CAPACITY = 50_000, 400
POLICIES = [
    CachePolicy(sinks=3, recent=2, center=32),
    CachePolicy(recent=7),
    CachePolicy(sinks=1, recent=5, center=32, defer=40),
    CachePolicy(sinks=4),
]
STAGES = ("before", "advanced", "planned", "half flushed", "flushed", "half appended", "appended")
"""Where a call can fail; the arrays are then as the kernels up to there have left them."""


class Machine:
    """Appends as the compiled functions do; from the call numbered ``failing`` on it stops after ``stage``."""

    def __init__(self, policy: CachePolicy) -> None:
        self.policy, self.failing, self.stage = policy, None, "before"

    def __getitem__(self, name):
        return lambda *tensors: self._step(name == "prefill", *tensors)

    def _step(self, chunk, ids, *tensors):
        *counts, tiles, plain, packed, lengths = tensors
        new = counts[0].numpy() if counts else np.ones(len(lengths.numpy()), np.int32)
        state, policy = [t.numpy().copy() for t in (tiles, plain, packed, lengths)], self.policy
        rows, before = ids.numpy(), packed.numpy().copy()
        stop = None
        if self.failing is not None:
            self.failing -= 1
            stop = self.stage if self.failing < 0 else None
        for stage in STAGES:
            if stage == "advanced":
                state[3] += new
            elif stage == "planned":
                state[2] = policy.packed_after(state[2], state[3], chunk)
            elif "flushed" in stage:
                self._flush(state, rows, new, before, half=stage.startswith("half"))
            elif "appended" in stage:
                self._append(state, rows, new, half=stage.startswith("half"))
            if stage == stop:
                break
        for tensor, value in zip((tiles, plain, packed, lengths), state, strict=True):
            tensor.copyfrom(value)
        if stop is not None:
            raise RuntimeError("out of registers")
        return tvm.runtime.tensor(np.zeros((len(rows), VOCAB), np.float32))

    def _flush(self, state, rows, new, before, half):
        tiles, plain, packed, lengths = state
        for b in range(len(rows)):
            stop = (before[b] + packed[b]) // 2 if half else packed[b]
            for number in range(before[b], stop):
                arrived = number + self.policy.sinks - (lengths[b] - new[b])
                old = plain[b, self.policy.sinks + number % self.policy.ring] if self.policy.ring else 0
                tiles[b, number] = rows[b, arrived] if arrived >= 0 else old

    def _append(self, state, rows, new, half):
        _, plain, packed, lengths = state
        for b in range(len(rows)):
            for row in range(new[b] // 2 if half else new[b]):
                place = lengths[b] - new[b] + row
                number = place - self.policy.sinks
                if number < 0:
                    plain[b, place] = rows[b, row]
                elif self.policy.ring and number >= packed[b]:
                    plain[b, self.policy.sinks + number % self.policy.ring] = rows[b, row]


def start(policy: CachePolicy, batch: int, chunk: int = 64) -> Session:
    """An empty session over such a library; tiles int32 [batch, tokens], 16-bit rows int32 [batch, slots]."""
    machine, device = Machine(policy), tvm.cpu()
    shapes = [(batch, 32 * policy.packed_tiles(CAPACITY) + 32), (batch, policy.slots), (batch,), (batch,)]
    tensors = [tvm.runtime.tensor(np.zeros(shape, np.int32)) for shape in shapes]
    info = SimpleNamespace(vocab_size=VOCAB, max_position=CAPACITY, batch=None)
    library = SimpleNamespace(info=info, device=device, weights=(), virtual_machine=lambda: machine)
    return Session(library, CacheArrays(tensors, device, policy), CAPACITY, chunk)


def check_held(session: Session, tokens: np.ndarray) -> None:
    """Host and device agree, and every sequence's tokens lie where they must."""
    tiles, plain, packed, lengths = (tensor.numpy() for tensor in session.cache.tensors)
    policy = session.cache.policy
    np.testing.assert_array_equal(session.lengths, lengths)
    np.testing.assert_array_equal(session.cache._packed, packed)
    for b, length in enumerate(lengths):
        assert 0 <= packed[b] <= max(length - policy.sinks, 0) and length - policy.sinks - packed[b] <= policy.ring
        for place in range(length):
            number = place - policy.sinks
            if number < 0:
                found = plain[b, place]
            else:
                ring = policy.sinks + number % max(policy.ring, 1)
                found = tiles[b, number] if number < packed[b] else plain[b, ring]
            assert found == tokens[b, place], (b, place)


@settings(max_examples=150, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    stage=st.sampled_from(STAGES),
    calls=st.integers(0, 2),
    chunk=st.sampled_from([1, 30, 64, 200]),
    begun=st.lists(st.integers(0, 120), min_size=2, max_size=2),
    new=st.lists(st.integers(0, 130), min_size=2, max_size=2),
    keep=st.integers(0, 120),
)
def test_what_is_kept_after_a_failing_prefill(policy, stage, calls, chunk, begun, new, keep):
    """Nothing is lost of a sequence that had not begun to flush; of one that had, what is in sinks and tiles stays."""
    session, tokens = start(policy, 2, chunk), np.arange(2 * CAPACITY).reshape(2, CAPACITY)
    if any(begun):
        session.prefill([row[:count] for row, count in zip(tokens, begun, strict=True)])
        session.crop(min(keep, max(begun)))
    lengths = session.lengths
    check_held(session, tokens)
    machine = session._machine
    machine.failing, machine.stage = calls, stage
    if max(new) <= calls * chunk:  # over before it fails
        new = [calls * chunk + 1, new[1]]
    if max(lengths + new) > CAPACITY:
        new = [0, 1]
        machine.failing = 0
    with pytest.raises(DeviceError, match="out of registers"):
        session.prefill([row[n : n + m] for row, n, m in zip(tokens, lengths, new, strict=True)])
    machine.failing = None
    check_held(session, tokens)
    assert (session.lengths <= lengths).all() and (session.lengths >= np.minimum(lengths, policy.sinks)).all()
    if STAGES.index(stage) < STAGES.index("planned"):
        np.testing.assert_array_equal(session.lengths, lengths)
    session.prefill([row[n : n + 60] for row, n in zip(tokens, session.lengths, strict=True)])
    session.decode(tokens[np.arange(2), session.lengths])
    check_held(session, tokens)


@pytest.mark.parametrize("stage", STAGES)
def test_a_failing_decode_that_flushes(stage):
    """Row 0 flushes its second block, row 1 nothing: row 0 keeps its sinks and first block."""
    session, tokens = start(POLICIES[0], 2), np.arange(2 * CAPACITY).reshape(2, CAPACITY)
    session.prefill([tokens[0, :68], tokens[1, :40]])
    session._machine.failing, session._machine.stage = 0, stage
    with pytest.raises(DeviceError):
        session.decode(tokens[[0, 1], session.lengths])
    flushing = STAGES.index(stage) >= STAGES.index("planned")
    assert session.lengths.tolist() == [3 + 32 if flushing else 68, 40]
    check_held(session, tokens)


def test_without_a_policy_nothing_is_lost():
    lengths = tvm.runtime.tensor(np.array([9, 4], np.int32))
    cache = CacheArrays([tvm.runtime.tensor(np.zeros((2, 1, 1, 4), np.uint32)), lengths], tvm.cpu())
    lengths.copyfrom(np.array([12, 5], np.int32))
    cache.restore(np.array([9, 4]))
    assert cache.lengths.tolist() == cache.device_lengths().tolist() == [9, 4]
