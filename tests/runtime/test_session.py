"""Prefill and decode against the NumPy reference of the fake model."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from rotquant_tvm.errors import DeviceError, KVCacheFull, UsageError


def expect(session, fake_model, rows):
    """The session holds exactly ``rows``: host lengths, device lengths, and what the next token sees."""
    lengths = [len(row) for row in rows]
    assert session.lengths.tolist() == lengths
    assert session.cache.device_lengths().tolist() == lengths
    seen = session.fork().decode([5] * len(rows))
    for logits, row in zip(seen, rows, strict=True):
        np.testing.assert_array_equal(logits, fake_model.reference_logits([*row, 5]))


def test_prefill_and_decode_give_the_models_logits(library, fake_model):
    session = library.session(batch=2, capacity=40)
    ids = np.array([[1, 2, 259], [7, 0, 9]])
    logits = session.prefill(ids)
    assert logits.shape == (2, fake_model.VOCAB) and logits.dtype == np.float32
    np.testing.assert_array_equal(logits[0], fake_model.reference_logits(ids[0]))
    np.testing.assert_array_equal(logits[1], fake_model.reference_logits(ids[1]))
    for shape in [(2,), (2, 1)]:
        logits = session.decode(np.full(shape, 33))
    np.testing.assert_array_equal(logits[1], fake_model.reference_logits([7, 0, 9, 33, 33]))
    expect(session, fake_model, [[1, 2, 259, 33, 33], [7, 0, 9, 33, 33]])


def test_flat_ids_are_one_row_of_a_session_of_one(library, fake_model):
    session = library.session()
    np.testing.assert_array_equal(session.prefill([1, 2])[0], fake_model.reference_logits([1, 2]))
    assert session.capacity == 128  # the artifact's default


@pytest.mark.parametrize("chunk", [1, 3, 32, 64, 512])
def test_prefill_in_chunks_equals_prefill_at_once(library, fake_model, chunk):
    rng = np.random.default_rng(chunk)
    rows = [rng.integers(0, fake_model.VOCAB, length).tolist() for length in (70, 0, 33, 1)]
    session = library.session(batch=4, capacity=128, chunk=chunk)
    logits = session.prefill(rows)
    for index in (0, 2, 3):
        np.testing.assert_array_equal(logits[index], fake_model.reference_logits(rows[index]))
    assert np.isnan(logits[1]).all()  # no token, no logits
    expect(session, fake_model, rows)


def test_default_chunk_bounds_what_the_library_is_given(library, fake_model):
    session = library.session(capacity=2000)
    machine, widths = session._machine, []

    class Recording:
        def __getitem__(self, name):
            def call(*args):
                widths.append(args[0].shape[1])
                return machine[name](*args)

            return call

    session._machine = Recording()
    ids = np.random.default_rng(0).integers(0, fake_model.VOCAB, 1100)
    np.testing.assert_array_equal(session.prefill(ids)[0], fake_model.reference_logits(ids))
    assert widths == [512, 512, 76]


def test_rows_grow_at_their_own_pace(library, fake_model):
    session = library.session(batch=2, capacity=64)
    session.prefill([[1], [4, 5, 6]])
    logits = session.prefill([[2, 3], []])
    np.testing.assert_array_equal(logits[0], fake_model.reference_logits([1, 2, 3]))
    session.prefill([[], [7]])
    expect(session, fake_model, [[1, 2, 3], [4, 5, 6, 7]])


def test_inactive_rows_keep_their_tokens(library, fake_model):
    session = library.session(batch=3, capacity=8)
    session.prefill([[1, 2], [3], [4] * 8])  # the third row is full
    logits = session.decode([9, 9, 9], active=[True, False, False])
    np.testing.assert_array_equal(logits[0], fake_model.reference_logits([1, 2, 9]))
    session.crop([3, 1, 7])
    session.decode([10, 10, 10], active=[False, False, True])
    session.crop([3, 1, 7])
    expect(session, fake_model, [[1, 2, 9], [3], [4] * 7])


def test_full_cache_refuses_and_stays_usable(library, fake_model):
    session = library.session(batch=2, capacity=40)
    session.prefill([[1] * 39, [2] * 10])
    with pytest.raises(KVCacheFull) as full:
        session.prefill([[3, 3], [4]])
    assert (full.value.capacity, full.value.needed, full.value.max_position) == (40, 41, None)
    assert "capacity=41" in str(full.value)
    expected = fake_model.reference_logits([1] * 39 + [5])
    np.testing.assert_array_equal(session.decode([5, 6])[0], expected)
    with pytest.raises(KVCacheFull):
        session.decode([1, 1])
    assert session.lengths.tolist() == session.cache.device_lengths().tolist() == [40, 11]
    session.crop(12)
    assert session.lengths.tolist() == [12, 11]
    expect(session, fake_model, [[1] * 12, [2] * 10 + [6]])


def test_positions_end_where_the_model_ends(library, fake_model):
    with pytest.raises(UsageError, match="positions end at 4096"):
        library.session(capacity=fake_model.MAX_POSITION + 1)
    session = library.session(capacity=fake_model.MAX_POSITION)
    for smaller in (session, library.session(capacity=32)):
        with pytest.raises(KVCacheFull, match=r"needs 4097; the model's positions end at 4096") as refused:
            smaller.prefill([1] * 4097)
        full = refused.value
        assert (full.capacity, full.needed, full.max_position) == (smaller.capacity, 4097, 4096)
        assert "capacity=" not in str(full) and full.exit_status == 2  # more capacity would not help
        assert smaller.lengths.tolist() == [0]


@pytest.mark.parametrize("name", ["batch", "capacity", "chunk"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4"])
def test_sizes_below_one_are_refused(library, name, value):
    with pytest.raises(UsageError, match=name) as refused:
        library.session(**{name: value})
    assert refused.value.exit_status == 2


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 260], [0]], "row 0: token id 260 at position 1"),
        ([[1], [-1]], "row 1: token id -1 at position 0"),
        ([[1.0], [2.0]], "integers"),
        ([[True], [False]], "integers"),
        ([[1]], "1 rows of token ids for a session of 2"),
        ([1, 2], "flat sequence"),
        ([[[1]], [[2]]], "flat sequence"),
        ([[1, [2]], [3]], "flat sequence"),
        ([["a"], ["b"]], "integers"),
        ("ab", "not text"),
        ([[], []], "no token"),
        (None, "rows"),
    ],
)
def test_bad_ids_are_refused_by_name(library, ids, message):
    session = library.session(batch=2, capacity=8)
    with pytest.raises(UsageError, match=message):
        session.prefill(ids)
    assert session.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("ids", [[1], [[1, 2], [3, 4]], [[1], [260]], [1.0, 2.0], 3])
def test_decode_takes_one_id_per_row(library, ids):
    session = library.session(batch=2, capacity=8)
    with pytest.raises(UsageError):
        session.decode(ids)
    assert session.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("active", [[True], [False, False], [[True, True]], [0, 1], ["a", ""], [0.0, float("nan")]])
def test_decode_needs_an_active_row(library, active):
    with pytest.raises(UsageError, match="active"):
        library.session(batch=2, capacity=8).decode([1, 2], active=active)


class FailingMachine:
    """A virtual machine whose second call raises after the library has run."""

    def __init__(self, machine, error):
        self.machine, self.error, self.calls = machine, error, 0

    def __getitem__(self, name):
        def call(*args):
            result = self.machine[name](*args)
            self.calls += 1
            if self.calls == 2:
                raise self.error
            return result

        return call


@pytest.mark.parametrize("error", [RuntimeError("context\nout of registers"), KeyboardInterrupt()])
def test_a_failing_library_leaves_the_cache_as_it_was(library, fake_model, error):
    session = library.session(batch=2, capacity=64, chunk=2)
    session.prefill([[1, 2, 3], [4]])
    machine = session._machine
    session._machine = FailingMachine(machine, error)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DeviceError) as failed:
        session.prefill([[5] * 5, [6] * 5])
    if isinstance(failed.value, DeviceError):
        assert failed.value.exit_status == 3
        assert "prefill failed on cpu:0: out of registers" in str(failed.value)
    assert session._machine.calls == 2
    session._machine = machine
    expect(session, fake_model, [[1, 2, 3], [4]])


def test_sessions_of_one_library_run_side_by_side(library, fake_model):
    prompts = [[65 + index, 66] for index in range(4)]
    results = {}

    def run(index):
        results[index] = library.session(capacity=300).generate(prompts[index], 200).ids

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, prompt in enumerate(prompts):
        assert list(results[index][:50]) == fake_model.reference_greedy(prompt, 50)
        assert results[index] == library.session(capacity=300).generate(prompt, 200).ids


def test_session_says_what_it_is(library, fake_model):
    session = library.session(batch=3, capacity=33)
    assert session.info.document == fake_model.INFO
    assert [(layer.k, layer.v) for layer in session.info.layers] == [
        ("hurwitz3", "hurwitz3"),
        ("hurwitz3", "f16"),
    ]
    assert session.info.bytes_per_token == 1 + 4
    assert session.report == {"layers": 2}
    assert session.kv_bytes() == 3 * 2 * (32 + 2 * 64) == session.info.cache_bytes(3, 33)
    assert session.kv_bytes() == sum(layer.numpy().nbytes for layer in session.cache.layers)
