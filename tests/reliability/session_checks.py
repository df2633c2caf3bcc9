"""What must hold of sessions over any library of a small decoder: broken activations, full caches, threads.

The decoder has more than 18 tokens, 128 positions or more and no end token. If its cache has a policy, a first block
leaves the ring with the token FLUSH.
"""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest

from rotquant_tvm.errors import DeviceError, KVCacheFull
from rotquant_tvm.runtime import CompiledLibrary

FLUSH = 3 + 2 + 32
BAD = 18
"""A token whose embedding the tests break."""


def broken(whole: CompiledLibrary, value: float) -> CompiledLibrary:
    """The same library, the embedding of the token BAD being ``value``."""
    weights = [weight.numpy().copy() for weight in whole.weights]
    embedding = next(w for w in weights if w.ndim == 2 and w.shape[0] == whole.info.vocab_size)
    embedding[BAD] = value
    return CompiledLibrary(whole._module, weights, whole.device)


def tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BAD, shape)


def arrays(session) -> list[np.ndarray]:
    return [tensor.numpy().copy() for tensor in session.cache.tensors]


def assert_equal_arrays(session, expected, rows=slice(None)) -> None:
    for found, wanted in zip(arrays(session), expected, strict=True):
        np.testing.assert_array_equal(found[rows], wanted[rows])


def broken_token_in_a_step(whole, value):
    """Logits say so at once; what is stored is 0, so that later tokens are whole."""
    library = broken(whole, value)
    ids = tokens(1, 2, FLUSH + 60)
    session, healthy = library.session(batch=2), library.session(batch=2)
    for each in (session, healthy):
        each.prefill(ids[:, :FLUSH])
    logits, expected = session.decode([BAD, ids[1, FLUSH]]), healthy.decode(ids[:, FLUSH])
    assert np.isnan(logits[0]).all()
    np.testing.assert_array_equal(logits[1], expected[1])
    for column in ids[:, FLUSH + 1 : FLUSH + 40].T:  # beyond the flush of the block with the bad token
        logits, expected = session.decode(column), healthy.decode(column)
        assert np.isfinite(logits).all()
        np.testing.assert_array_equal(logits[1], expected[1])
    assert_equal_arrays(session, arrays(healthy), 1)


def crop_to_before_a_broken_token(whole):
    """Bit for bit, as long as the bad token has not gone into tiles with the block that is cropped into."""
    library = broken(whole, np.nan)
    ids = tokens(2, 2, 60)
    session, healthy = library.session(batch=2), library.session(batch=2)
    for each in (session, healthy):
        each.prefill(ids[:, :20])
    for bad in ([BAD, 5], [3, BAD], [BAD, BAD]):
        session.decode(bad)
    session.prefill([[4, BAD, 5], [6]])
    session.crop(20)
    for column in ids[:, 20:].T:
        np.testing.assert_array_equal(session.decode(column), healthy.decode(column))


def broken_token_in_a_prefill(whole):
    """Its logits say so, whichever chunk it was in."""
    library = broken(whole, np.nan)
    ids = tokens(3, 3, 60)
    ids[0, 5] = ids[2, 59] = BAD
    session, healthy = library.session(batch=3, chunk=16), library.session(batch=3, chunk=16)
    logits = session.prefill(ids)
    assert np.isnan(logits[[0, 2]]).all()
    np.testing.assert_array_equal(logits[1], healthy.prefill(np.where(ids == BAD, 1, ids))[1])
    assert_equal_arrays(session, arrays(healthy), 1)
    assert np.isfinite(session.decode([1, 1, 1])).all()
    session.crop(0)
    assert np.isfinite(session.prefill(tokens(4, 3, 50))).all()


def broken_token_in_generation(whole):
    """Its sequence is named, and the others can go on."""
    library, ids = broken(whole, np.nan), tokens(5, 3, 10)
    session, healthy = library.session(batch=3), library.session(batch=3)
    ids[1, 4] = BAD
    with pytest.raises(DeviceError, match="logits hold nan in sequence 1"):
        session.generate(ids.tolist(), 5)
    healthy.prefill(np.where(ids == BAD, 0, ids))
    assert session.lengths.tolist() == [10, 10, 10]
    found, expected = (s.decode([1, 1, 1], active=[True, False, True]) for s in (session, healthy))
    np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])


def full_sequence_of_a_ragged_batch(whole):
    """It is named, nothing changes; the others go on as by prefills of one token beside one that has room."""
    ids, lengths = tokens(6, 3, 100), [20, 64, 41]
    session, roomy = (whole.session(batch=3, capacity=capacity) for capacity in (64, 128))
    for each in (session, roomy):
        each.prefill([row[:n] for row, n in zip(ids, lengths, strict=True)])
    before = arrays(session)
    for call in (lambda: session.decode([1, 2, 3]), lambda: session.prefill([[1], [2], []])):
        with pytest.raises(KVCacheFull, match="needs 65 for sequence 1") as full:
            call()
        assert full.value.sequence == 1
        assert_equal_arrays(session, before)
    for step in range(20):
        first, third = ids[0, 20 + step], ids[2, 41 + step]
        found = session.decode([first, 0, third], active=[True, False, True])
        np.testing.assert_array_equal(found[[0, 2]], roomy.prefill([[first], [], [third]])[[0, 2]])
    assert session.lengths.tolist() == [40, 64, 61]
    assert_equal_arrays(session, before, 1)


def generation_to_the_end_of_the_cache(whole):
    """Each sequence ends by itself."""
    prompts = [tokens(7, n).tolist() for n in (60, 20, 63)]
    session = whole.session(capacity=64)
    together = session.generate(prompts, max_tokens=None)
    assert [result.finish_reason for result in together] == ["length"] * 3
    assert [len(result.ids) for result in together] == [5, 45, 2]
    assert session.lengths.tolist() == [64, 64, 64]


def _results(whole, count: int) -> list[np.ndarray]:
    """Logits of a session whose tokens follow from its number."""
    session, ids = whole.session(batch=1 + count % 2), tokens(count, 2, 70)
    logits = [session.prefill(ids[: session.batch, : 20 + count])]
    logits += [session.decode(column[: session.batch]) for column in ids[:, 30:60].T]
    return logits


def sessions_in_threads(whole):
    """They give what they give alone."""
    expected = [_results(whole, count) for count in range(6)]
    found: dict[int, list] = {}
    for _ in range(2):
        threads = [threading.Thread(target=lambda n=n: found.update({n: _results(whole, n)})) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for count, wanted in enumerate(expected):
            for a, b in zip(found.pop(count), wanted, strict=True):
                np.testing.assert_array_equal(a, b)


CHECKS = {
    "NaN in a step": partial(broken_token_in_a_step, value=np.nan),
    "Inf in a step": partial(broken_token_in_a_step, value=np.inf),
    "-Inf in a step": partial(broken_token_in_a_step, value=-np.inf),
    "crop": crop_to_before_a_broken_token,
    "NaN in a prefill": broken_token_in_a_prefill,
    "NaN in generation": broken_token_in_generation,
    "full sequence": full_sequence_of_a_ragged_batch,
    "generation to the end": generation_to_the_end_of_the_cache,
    "threads": sessions_in_threads,
}
