"""Crop, fork, reorder and reset: a random history must leave what a list of token lists would hold."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rotquant_tvm.cache_policy import NO_POLICY, CachePolicy
from rotquant_tvm.errors import DeviceError, UsageError
from rotquant_tvm.runtime.cache_arrays import CacheArrays

CAPACITY = 72


def check(session, rows, fake_model):
    lengths = [len(row) for row in rows]
    assert session.lengths.tolist() == lengths == session.cache.device_lengths().tolist()
    assert session.batch == len(rows)
    room = [index for index, row in enumerate(rows) if len(row) < CAPACITY]
    if not room:
        return
    probe = session.fork()
    logits = probe.decode([3] * len(rows), active=[index in room for index in range(len(rows))])
    for index in room:
        np.testing.assert_array_equal(logits[index], fake_model.reference_logits([*rows[index], 3]))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_any_history_equals_lists_of_tokens(library, fake_model, data, seed):
    rng = np.random.default_rng(seed)
    session = library.session(batch=2, capacity=CAPACITY, chunk=int(rng.integers(1, 40)))
    rows = [[], []]
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(
            st.sampled_from(["prefill", "decode", "crop", "crop each", "reorder", "fork", "reset"])
        )
        if action == "prefill":
            new = [
                rng.integers(0, fake_model.VOCAB, rng.integers(0, CAPACITY - len(row) + 1)).tolist()
                for row in rows
            ]
            if any(new):
                session.prefill(new)
            rows = [row + more for row, more in zip(rows, new, strict=True)]
        elif action == "decode":
            active = np.array([len(row) < CAPACITY and bool(rng.integers(0, 2)) for row in rows])
            if active.any():
                tokens = rng.integers(0, fake_model.VOCAB, len(rows))
                session.decode(tokens, active)
                rows = [
                    [*row, int(token)] if on else row
                    for row, token, on in zip(rows, tokens, active, strict=True)
                ]
        elif action == "crop":
            keep = int(rng.integers(0, max(map(len, rows)) + 1))
            session.crop(keep)
            rows = [row[:keep] for row in rows]
        elif action == "crop each":
            keeps = [int(rng.integers(0, len(row) + 1)) for row in rows]
            session.crop(keeps)
            rows = [row[:keep] for row, keep in zip(rows, keeps, strict=True)]
        elif action == "reorder":
            order = rng.integers(0, len(rows), rng.integers(1, 5)).tolist()
            session.reorder(order)
            rows = [rows[index] for index in order]
        elif action == "fork":
            parent, session = session, session.fork()
            parent.reset()
            parent.prefill([[9] * CAPACITY] * parent.batch)  # must not reach the fork
        else:
            batch = int(rng.integers(1, 4))
            session.reset(batch)
            rows = [[] for _ in range(batch)]
    check(session, rows, fake_model)


def test_fork_leaves_the_parent_alone(library, fake_model):
    parent = library.session(capacity=CAPACITY)
    parent.prefill([1, 2, 3])
    child = parent.fork()
    child.crop(1)
    child.prefill([7] * 60)
    assert child.library is parent.library
    check(parent, [[1, 2, 3]], fake_model)
    check(child, [[1] + [7] * 60], fake_model)


def test_reorder_may_widen_and_narrow_the_batch(library, fake_model):
    session = library.session(batch=2, capacity=CAPACITY)
    session.prefill([[1, 2], [3]])
    before = session.kv_bytes()
    session.reorder([1, 0, 0])
    assert session.kv_bytes() == before * 3 // 2
    check(session, [[3], [1, 2], [1, 2]], fake_model)
    session.reorder(np.array([2]))
    check(session, [[1, 2]], fake_model)


@pytest.mark.parametrize("indices", [[], [2], [-1], [0.0], 0, [[0]], [True]])
def test_reorder_refuses_what_is_no_sequence(library, indices):
    session = library.session(batch=2, capacity=8)
    with pytest.raises(UsageError, match="reorder"):
        session.reorder(indices)
    assert session.batch == 2


@pytest.mark.parametrize("keep", [-1, 4, [3], [2, 1], [3, -1], [4, 1], 1.0, "1", [[1], [1]], None])
def test_crop_refuses_more_or_less_than_there_is(library, keep):
    session = library.session(batch=2, capacity=8)
    session.prefill([[1, 2, 3], []])
    with pytest.raises(UsageError, match="crop"):
        session.crop(keep)
    assert session.lengths.tolist() == session.cache.device_lengths().tolist() == [3, 0]


def test_lengths_cannot_be_changed_from_outside(library):
    session = library.session(capacity=8)
    session.prefill([1, 2])
    session.lengths[0] = 7
    assert session.lengths.tolist() == [2]


def test_reset_refuses_a_batch_below_one(library):
    session = library.session(capacity=8)
    with pytest.raises(UsageError, match="batch"):
        session.reset(0)


def test_a_cache_that_does_not_fit_is_a_device_error(library):
    with pytest.raises(DeviceError, match=r"no room on cpu:0: a KV cache of batch 1099511627776 x .* takes .* TiB"):
        library.session(batch=1 << 40, capacity=4096)


def test_contents_that_someone_else_wrote_are_assumed():
    policy = CachePolicy(sinks=4, recent=64, center=64)
    for kept in (NO_POLICY, policy):
        counts = [tvm.runtime.tensor(np.zeros(3, np.int32)) for _ in range(2 if kept.segmented else 1)]
        cache = CacheArrays([tvm.runtime.tensor(np.zeros((3, 1, 8, 4), np.uint32)), *counts], tvm.cpu(), kept)
        lengths = np.array([0, 70, 200])
        cache.assume(lengths)
        np.testing.assert_array_equal(cache.lengths, lengths)
        np.testing.assert_array_equal(cache.device_lengths(), lengths)
        if kept.segmented:
            expected = kept.packed_after(np.zeros(3, np.int32), lengths.astype(np.int32), False)
            np.testing.assert_array_equal(cache.tensors[-2].numpy(), expected)
