"""Sessions of a small compiled Llama whose cache has a policy: 16-bit sinks and ring, K centred by blocks.

Sequences are compared with other sessions of the same library that were given the same tokens the same way: their
kernels compute the same, whatever else the batch holds, up to the order of float sums.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import transformers

import rotquant_tvm
from rotquant_tvm.errors import ArtifactError, KVCacheFull, UsageError
from rotquant_tvm.runtime import KVCacheInfo

from .decoded_cache import check as check_decoded
from .reliability.session_checks import CHECKS
from .sampling import sampled

SIZES = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 32}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
POLICY = "hurwitz3,sinks=3,recent=2,center=32"
DEFERRED = f"{POLICY},defer=64"
CAPACITY = 160
SINKS, RECENT, BLOCK = 3, 2, 32
FLUSH = SINKS + RECENT + BLOCK
"""The length with which a sequence's first block leaves the ring."""


@cache
def model(kv_cache: str) -> rotquant_tvm.CompiledModel:
    """A random Llama with this cache."""
    torch.manual_seed(0)
    llama = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.normal_(std=0.15).add_(0.5 if parameter.ndim == 1 else 0.0)
    return rotquant_tvm.compile(llama, kv_cache, capacity=CAPACITY)


@cache
def library(kv_cache: str = POLICY):
    return model(kv_cache).library()


def tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 61, shape)


def arrays(session) -> list[np.ndarray]:
    """Copies of all of a session's arrays."""
    return [tensor.numpy().copy() for tensor in session.cache.tensors]


def check_counts(session, lengths, packed) -> None:
    """Lengths and tokens in tiles, on the host and on the device."""
    assert session.lengths.tolist() == session.cache.device_lengths().tolist() == list(lengths)
    assert session.cache._packed.tolist() == session.cache.tensors[-2].numpy().tolist() == list(packed)


def fed(ids, start: int, kv_cache: str = POLICY, batch: int = 1):
    """A session after a prefill of ``start`` of the ids and single steps, and the logits of each step."""
    session = library(kv_cache).session(batch=batch)
    ids = np.atleast_2d(ids)
    logits = [session.prefill(ids[:, :start])]
    return session, np.array(logits + [session.decode(column) for column in ids[:, start:].T])


def test_ragged_sequences_together_are_each_alone():
    """Across the first flush of each, at steps of their own, and a ragged second prefill."""
    starts, more, ids = [30, 1, 45], [5, 40, 0], tokens(1, 3, 130)
    together = library().session(batch=3)
    alone = [library().session() for _ in starts]

    def check(logits, singles):
        for row, single in enumerate(singles):
            if single is not None:
                np.testing.assert_allclose(logits[row], single[0], atol=2e-4)

    def prefill(counts):
        rows = [ids[r, n : n + count] for r, (n, count) in enumerate(zip(together.lengths, counts, strict=True))]
        check(together.prefill(rows), [s.prefill([r]) if len(r) else None for s, r in zip(alone, rows, strict=True)])

    def decode(steps):
        for _ in range(steps):
            column = ids[np.arange(3), together.lengths]
            check(together.decode(column), [s.decode([t]) for s, t in zip(alone, column, strict=True)])

    prefill(starts)
    decode(38)
    prefill(more)
    decode(3)
    lengths = [n + m + 41 for n, m in zip(starts, more, strict=True)]
    check_counts(together, lengths, [(n - SINKS - RECENT) // BLOCK * BLOCK for n in lengths])


def test_what_is_saved_can_be_decoded_elsewhere(tmp_path):
    """Sinks, tiles with their means, and the ring of two sequences, the second too short for a tile."""
    session = library().session(batch=2)
    ids = tokens(4, 2, 90)
    session.prefill([ids[0, :88], ids[1, :20]])
    session.decode(ids[:, 88])
    check_decoded(model(POLICY), session, tmp_path)


def test_an_inactive_sequence_is_left_alone():
    """Its arrays keep their bits, its later logits are those of a session without the steps that it sat out."""
    ids = tokens(2, 2, 90)
    session, alone = library().session(batch=2), library().session()
    session.prefill([ids[0, :33], ids[1, :34]])
    alone.prefill([ids[1, :34]])
    for step in range(50):
        waits = step % 3 != 0
        before = arrays(session)
        logits = session.decode(ids[np.arange(2), session.lengths], [True, not waits])
        if waits:
            for old, new in zip(before, arrays(session), strict=True):
                np.testing.assert_array_equal(new[1], old[1])
            assert not np.array_equal(before[-3][0], arrays(session)[-3][0])
        else:
            np.testing.assert_allclose(logits[1], alone.decode(ids[1, alone.lengths])[0], atol=2e-4)
    check_counts(session, [83, 51], [64, 32])
    check_counts(alone, [51], [32])


def test_an_active_sequence_beside_a_waiting_one_goes_on():
    """Such a step is a prefill of one token: where it flushes, it still reads the block's exact keys and values."""
    ids = tokens(3, 2, 60)
    session, (_, expected) = library().session(batch=2), fed(ids[0], 30)
    session.prefill(ids[:, :30])
    for length, wanted in enumerate(expected[1:], start=31):
        logits = session.decode(ids[:, length - 1], [True, False])
        far = np.linalg.norm(logits[0] - wanted[0]) / np.linalg.norm(wanted[0])
        assert far < (1e-3 if length < FLUSH else 0.3 if length == FLUSH else 0.05), length
    check_counts(session, [60, 30], [32, 0])


@pytest.mark.parametrize(
    ("length", "keep"),
    [
        (20, 9),  # nothing was in tiles
        (FLUSH - 1, 4),
        (60, 45),  # behind the first block, in the ring
        (60, SINKS + BLOCK),  # exactly the first block is left
        (100, SINKS),  # the sinks alone: every block begins anew
        (100, 1),
        (50, 0),
    ],
)
def test_after_a_crop_into_16_bits_nothing_is_left_of_the_rest(length, keep):
    """The same logits, bit for bit, as a session that was never longer, also across later flushes."""
    ids, others = tokens(4, length), tokens(5, 80)
    session, _ = fed(ids, 1)
    session.crop(keep)
    fresh = fed(ids[:keep], 1)[0] if keep else library().session()
    if SINKS + BLOCK <= keep < FLUSH:  # a shorter sequence has not flushed its block yet
        fresh, _ = fed(ids[:FLUSH], 1)
        fresh.crop(keep)
    check_counts(session, [keep], [0 if keep < SINKS + BLOCK else BLOCK])
    for token in others:
        np.testing.assert_array_equal(session.decode([token]), fresh.decode([token]))
    check_counts(session, fresh.lengths, fresh.cache._packed)


def test_a_crop_into_a_packed_block():
    """Tokens in tiles stay there, with their centre; what follows is near what a fresh session says."""
    ids, others = tokens(6, 2, 120), tokens(7, 2, 60)
    session = library().session(batch=2)
    session.prefill(ids)
    check_counts(session, [120, 120], [96, 96])
    session.crop([50, 110])
    check_counts(session, [50, 110], [47, 96])
    centres = session.cache.layers[1].numpy()[:, :, 1].copy()
    session.crop(50)
    check_counts(session, [50, 50], [47, 47])
    fresh = library().session(batch=2)
    fresh.prefill(ids[:, :50])
    far = []
    for step, column in enumerate(others.T):
        logits, wanted = session.decode(column), fresh.decode(column)
        assert np.isfinite(logits).all() and session.lengths.tolist() == [51 + step] * 2
        far.append(np.linalg.norm(logits - wanted) / np.linalg.norm(wanted))
    check_counts(session, [110, 110], [96, 96])
    np.testing.assert_array_equal(session.cache.layers[1].numpy()[:, :, 1], centres)
    assert np.median(far) < 0.25


def test_a_fork_is_a_copy_of_everything():
    ids, others = tokens(8, 2, 55), tokens(9, 2, 30)
    parent, _ = fed(ids, 40, batch=2)
    child, before = parent.fork(), arrays(parent)
    check_counts(child, [55, 55], [32, 32])
    first = [parent.decode(column) for column in others.T]
    for old, copied in zip(before, arrays(child), strict=True):
        np.testing.assert_array_equal(copied, old)
    np.testing.assert_array_equal([child.decode(column) for column in others.T], first)
    check_counts(child, [85, 85], [64, 64])


@pytest.mark.parametrize("capacity", [CAPACITY, 55 + 30, 400])
def test_a_saved_session_is_taken_up_where_it_was(tmp_path, capacity):
    ids, others = tokens(8, 2, 55), tokens(9, 2, 30)
    parent, _ = fed(ids, 40, batch=2)
    parent.save(tmp_path / "prefix.kv")
    child = library().restore(tmp_path / "prefix.kv", capacity)
    check_counts(child, [55, 55], [32, 32])
    first = [parent.decode(column) for column in others.T]
    np.testing.assert_array_equal([child.decode(column) for column in others.T], first)
    check_counts(child, [85, 85], [64, 64])


def test_a_cropped_session_is_taken_up_where_its_tiles_fit(tmp_path):
    """67 of the tokens left are in tiles of three blocks; a cache for 70 tokens has fewer, and the rest in 16 bits."""
    parent, _ = fed(tokens(8, 2, 150), 150, batch=2)
    parent.crop(70)
    check_counts(parent, [70, 70], [67, 67])
    parent.save(tmp_path / "prefix.kv")
    least = 3 * BLOCK + SINKS + RECENT
    for capacity in (70, least - 1):
        with pytest.raises(UsageError, match=f"holds 70 tokens.*{least}; the capacity is {capacity}, use {least} or"):
            library().restore(tmp_path / "prefix.kv", capacity)
    child, others = library().restore(tmp_path / "prefix.kv", least), tokens(9, 2, 20)
    assert library().restore(tmp_path / "prefix.kv").capacity == CAPACITY
    expected = [parent.decode(column) for column in others.T]
    np.testing.assert_array_equal([child.decode(column) for column in others.T], expected)


def test_counts_that_no_policy_gives_are_refused(tmp_path):
    session, _ = fed(tokens(8, 2, 55), 40, batch=2)
    session.cache._packed[:] = 0  # 52 tokens in a ring of 34
    session.save(tmp_path / "prefix.kv")
    with pytest.raises(ArtifactError, match="contradict the cache policy"):
        library().restore(tmp_path / "prefix.kv")


def test_reordering_moves_everything():
    ids = tokens(10, 3, 80)
    session = library().session(batch=3)
    session.prefill([ids[0, :70], ids[1, :20], ids[2, :50]])
    before, order = arrays(session), [2, 0, 0, 1]
    session.reorder(order)
    check_counts(session, [50, 70, 70, 20], [32, 64, 64, 0])
    for old, new in zip(before, arrays(session), strict=True):
        np.testing.assert_array_equal(new, old[order])
    logits = session.decode([5, 6, 6, 7])
    np.testing.assert_array_equal(logits[1], logits[2])
    assert session.kv_bytes() == session.info.cache_bytes(4, CAPACITY)


@pytest.mark.parametrize("kv_cache", sampled([POLICY, DEFERRED], [POLICY]))
@pytest.mark.parametrize(("batch", "capacity"), [(1, 1), (3, 36), (2, 37), (1, 69), (2, CAPACITY), (1, 1024)])
def test_bytes_are_those_of_the_live_arrays(kv_cache, batch, capacity):
    session = library(kv_cache).session(batch, capacity)
    live = sum(tensor.numpy().nbytes for tensor in session.cache.tensors[:-2])
    assert session.kv_bytes() == live == session.info.cache_bytes(batch, capacity)
    if capacity == 1024:
        elements = SIZES["num_hidden_layers"] * SIZES["num_key_value_heads"] * 2 * SIZES["head_dim"] * capacity
        assert model(kv_cache).report["true_bits"]["1024"] == pytest.approx(8 * live / elements)


def test_the_bytes_of_a_policy_by_hand():
    """Per layer and kv head: tiles of 32 tokens, a centre per block, sinks and ring as fp16 keys and values."""
    tile, centre, slots = 2 * (32 * 32 * 3 // 8 + 32 * 2), 32 + 4, SINKS + RECENT + BLOCK
    one = 4 * (4 * tile + 4 * centre + slots * 2 * 32 * 2)  # (160 - 5) // 32 blocks
    assert library().session(batch=5).kv_bytes() == 5 * one


@pytest.mark.full
@pytest.mark.parametrize("chunk", [512, 40, 7])
def test_deferred_keys_are_not_quantized_during_prefill(chunk):
    """Up to the slots of the ring every prefill, in whichever chunks, is one over an f16 cache; decode drains it."""
    ids, count = tokens(11, 2, 120), SINKS + RECENT + BLOCK + 64
    session, exact = library(DEFERRED).session(2, CAPACITY, chunk), library("f16").session(2, CAPACITY, chunk)
    for stop in (60, count):
        part = ids[:, session.lengths[0] : stop]
        np.testing.assert_allclose(session.prefill(part), exact.prefill(part), atol=1e-2)
        check_counts(session, [stop, stop], [0, 0])
    assert not any(session.cache.layers[i].numpy().any() for i in (0, 1, 3, 4))  # tiles and centres
    session.decode(ids[:, count])
    check_counts(session, [count + 1] * 2, [96, 96])
    session.prefill(ids[:, count + 1 :])
    check_counts(session, [120, 120], [96, 96])


@pytest.mark.full
def test_a_deferred_prefill_that_does_not_fit_moves_out_the_surplus():
    ids = tokens(12, 150)
    session = library(DEFERRED).session()
    session.prefill([ids[:130]])
    check_counts(session, [130], [32])
    session.prefill([ids[130:]])
    check_counts(session, [150], [64])


def test_a_full_cache_stays_usable():
    ids = tokens(13, 2, 90)
    session = library().session(batch=2, capacity=70)
    session.prefill([ids[0, :66], ids[1, :40]])
    with pytest.raises(KVCacheFull):
        session.prefill([[5] * 5, [6]])
    check_counts(session, [66, 40], [32, 32])
    for n in range(66, 70):
        session.decode(ids[:, n])
    before = arrays(session)
    with pytest.raises(KVCacheFull):
        session.decode([4, 4])
    for old, new in zip(before, arrays(session), strict=True):
        np.testing.assert_array_equal(new, old)
    session.decode([4, 7], active=[False, True])
    check_counts(session, [70, 45], [64, 32])
    np.testing.assert_array_equal(arrays(session)[2][0], before[2][0])
    session.crop([2, 45])
    session.prefill([ids[0, 2:66], []])
    assert np.isfinite(session.decode([5, 5])).all()
    check_counts(session, [67, 46], [32, 32])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return model(POLICY).save(tmp_path_factory.mktemp("policy") / "model")


def test_a_saved_model_keeps_its_policy(saved):
    loaded, session = rotquant_tvm.load(saved.path, batch=2), library().session(batch=2)
    assert loaded.info == session.info and loaded.info.policy.name == POLICY.partition(",")[2]
    ids = tokens(14, 2, 60)
    np.testing.assert_array_equal(loaded.prefill(ids[:, :36]), session.prefill(ids[:, :36]))
    for column in ids[:, 36:].T:
        np.testing.assert_array_equal(loaded.decode(column), session.decode(column))
    check_counts(loaded, [60, 60], [32, 32])
    for one, other in zip(arrays(loaded), arrays(session), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_older_library_is_refused(saved, tmp_path):
    """Version 1 of the description knew no policy: its functions take other arrays."""
    old = dict(saved.manifest.info.document) | {"version": 1}
    with pytest.raises(ArtifactError, match="version is 1 and this release reads 2 and 3; compile the model again"):
        KVCacheInfo.from_document(old)
    path = shutil.copytree(saved.path, tmp_path / "old")
    stale = replace(saved.manifest, info=replace(saved.manifest.info, document=old))
    (path / "manifest.json").write_text(stale.to_json())
    with pytest.raises(ArtifactError, match=r"kv_cache_info.*version is 1 and this release reads 2 and 3"):
        rotquant_tvm.load(path)


@pytest.mark.parametrize("check", CHECKS)
def test_faults(check):
    """NaN, full caches, threads: what every session must bear."""
    CHECKS[check](library())
