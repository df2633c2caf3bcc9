"""``Session.verify``: the logits after every token, over the fake model, whose prefill is called token by token."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import tvm

from rotquant_tvm.errors import ArtifactError, DeviceError, KVCacheFull, UsageError
from rotquant_tvm.runtime import KVCacheInfo
from rotquant_tvm.runtime.token_rows import joined_logits

ROWS = [[1, 2, 259, 4, 5, 6, 7], [], [9, 8, 7]]


class Verifying:
    """The fake model's virtual machine with a function ``verify``; ``fails`` in this call of it."""

    def __init__(self, machine, fails=None):
        self.machine, self.fails, self.widths = machine, fails, []

    def __getitem__(self, name):
        return self._verify if name == "verify" else self.machine[name]

    def _verify(self, ids, lengths, *others):
        columns, device = [], tvm.cpu()
        for place, column in enumerate(ids.numpy().T):
            given = [tvm.runtime.tensor(np.ascontiguousarray(column[:, None]), device)]
            given.append(tvm.runtime.tensor((lengths.numpy() > place).astype(np.int32), device))
            columns.append(self.machine["prefill"](*given, *others).numpy())
        self.widths.append(len(columns))
        if self.fails == len(self.widths):
            raise RuntimeError("out of registers")
        return tvm.runtime.tensor(np.stack(columns, axis=1), device)


@pytest.fixture
def start(library):
    """Start a session that can verify."""
    every = copy.copy(library)
    every.info = dataclasses.replace(library.info, every_logit=True)

    def session(fails=None, **options):
        made = every.session(**options)
        made._machine = Verifying(made._machine, fails)
        return made

    return session


@pytest.mark.parametrize(("chunk", "widths"), [(1, [1] * 7), (3, [3, 3, 1]), (512, [7])])
def test_rows_of_any_length_have_the_logits_after_each_token(start, fake_model, chunk, widths):
    session = start(batch=3, capacity=40, chunk=chunk)
    session.prefill([[3, 4], [5], []])
    logits = session.verify(ROWS)
    assert logits.shape == (3, 7, fake_model.VOCAB) and logits.dtype == np.float32
    for past, row, found in zip(([3, 4], [5], []), ROWS, logits, strict=True):
        for place in range(len(row)):
            np.testing.assert_array_equal(found[place], fake_model.reference_logits([*past, *row[: place + 1]]))
        assert np.isnan(found[len(row) :]).all()
    assert session._machine.widths == widths and session.lengths.tolist() == [9, 1, 3]


def test_a_rejected_draft_is_cropped_away(start, fake_model):
    session = start(capacity=40)
    session.prefill([3, 4])
    session.verify([7, 7, 7])
    session.crop(3)
    np.testing.assert_array_equal(session.decode([5])[0], fake_model.reference_logits([3, 4, 7, 5]))


def test_what_follows_a_nan_is_nan():
    parts = [np.zeros((2, 2, 3), np.float32), np.zeros((2, 2, 3), np.float32)]
    parts[0][0, 1, 2] = np.nan
    found = np.isnan(joined_logits(parts, np.array([4, 3])))
    assert found.all(axis=2).tolist() == [[False, True, True, True], [False, False, False, True]]
    assert (found.all(axis=2) == found.any(axis=2)).all()


def test_a_library_without_says_how_to_compile(library):
    session = library.session(capacity=8)
    assert not library.every_logit
    with pytest.raises(UsageError, match=r"every_logit=True \(tvmc compile --every-logit\)"):
        session.verify([1])
    assert session.lengths.tolist() == [0]


def test_what_prefill_refuses_is_refused(start):
    session = start(batch=2, capacity=8)
    for ids, message in (([[], []], "verify was given no token"), ([[1], [260]], "token id 260"), ([[1]], "1 rows")):
        with pytest.raises(UsageError, match=message):
            session.verify(ids)
    with pytest.raises(KVCacheFull):
        session.verify([[1] * 9, [1]])
    assert session.lengths.tolist() == [0, 0] and not session._machine.widths


def test_a_call_that_fails_midway_holds_no_new_token(start, fake_model):
    session = start(fails=2, capacity=40, chunk=2)
    session.prefill([3, 4])
    with pytest.raises(DeviceError, match="verify failed on cpu:0: out of registers"):
        session.verify([1, 2, 3, 4, 5])
    assert session.lengths.tolist() == session.cache.device_lengths().tolist() == [2]
    np.testing.assert_array_equal(session.decode([5])[0], fake_model.reference_logits([3, 4, 5]))


def test_the_description_says_so_or_not(fake_model):
    assert not KVCacheInfo.from_document(fake_model.INFO).every_logit
    assert KVCacheInfo.from_document(fake_model.INFO | {"every_logit": True}).every_logit
    with pytest.raises(ArtifactError, match="'every_logit' is 1"):
        KVCacheInfo.from_document(fake_model.INFO | {"every_logit": 1})
