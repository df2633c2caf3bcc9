"""Sessions of small models with sliding windows whose caches have a policy: sinks, a 16-bit ring, centres."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm.errors import UsageError

from .test_window_session import CAPACITY, IDS, KEPT, expected, library

POLICY = "hurwitz3,sinks=3,recent=2,center=32"


@pytest.mark.full
def test_a_window_under_a_policy(tmp_path):
    """Ragged sequences together are each alone, in memory that does not grow; crops are bounded by the tiles."""
    session = library("mistral", POLICY).session(batch=2)
    info = session.info
    assert {layer.ring.tokens for layer in info.layers} == {KEPT} and info.policy.name == POLICY.partition(",")[2]
    assert info.cache_bytes(1, 500) == info.cache_bytes(1, 200) > info.cache_bytes(1, 64)
    alone = [library("mistral", POLICY).session() for _ in range(2)]

    def prefill(counts):
        rows = [IDS[r, n : n + count] for r, (n, count) in enumerate(zip(session.lengths, counts, strict=True))]
        others = [one.prefill(row) if len(row) else None for one, row in zip(alone, rows, strict=True)]
        return session.prefill(rows), others

    def compare(logits, others):
        for found, other in zip(logits, others, strict=True):
            if other is not None:
                assert np.linalg.norm(found - other[0]) < 1e-2 * np.linalg.norm(other)

    for counts in ([30, 100], [90, 0], [3, 60]):
        compare(*prefill(counts))
        for _ in range(15):
            ids = [IDS[r, n] for r, n in enumerate(session.lengths)]
            compare(session.decode(ids), [one.decode([token]) for one, token in zip(alone, ids, strict=True)])
    assert session.lengths.tolist() == [168, 205]
    # Behind three sinks 160 and 192 tokens are in tiles, of which the last 96 are held; and the window's 39 before.
    assert session.shortest_crop().tolist() == [64 + 3 + 39, 96 + 3 + 39]
    with pytest.raises(UsageError, match="crop to 106 or more, or to at most 3 and prefill again"):
        session.crop([105, 205])
    session.crop([107, 3])
    assert session.shortest_crop().tolist() == [106, 0]
    # A block that the crop left begun is saved too.
    session.save(tmp_path / "prefix.kv")
    restored = library("mistral", POLICY).restore(tmp_path / "prefix.kv")
    assert restored.shortest_crop().tolist() == [106, 0]
    for token in range(5, 15):
        np.testing.assert_array_equal(restored.decode([token, 6]), session.decode([token, 6]))


@pytest.mark.full
def test_a_block_that_a_crop_left_begun_is_saved(tmp_path):
    """Where one tile fewer than it needs would do for so many tokens that came one by one."""
    session = library("gemma3", POLICY).session()
    session.prefill(IDS[0, :90])
    session.crop(43)
    session.save(tmp_path / "prefix.kv")
    restored = library("gemma3", POLICY).restore(tmp_path / "prefix.kv")
    np.testing.assert_array_equal(restored.decode([5]), session.decode([5]))


@pytest.mark.full
def test_a_preset_keeps_close_to_sixteen_bits():
    """rq4 with its sinks, 16-bit ring and centres, far past the window."""
    session = library("mistral", "rq4").session(batch=3)
    session.prefill(list(IDS[:, :150]))
    errors = []
    for step in range(150, 230):
        logits = session.decode(IDS[:, step])
        exact = expected("mistral")[:, step]
        errors.append(np.linalg.norm(logits - exact, axis=-1) / np.linalg.norm(exact, axis=-1))
    assert np.median(errors) < 0.2 and session.kv_bytes() == session.info.cache_bytes(3, CAPACITY)
