"""Vector indexes: what they store, and that search finds what the format's estimates rank first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm

from rotquant_tvm.errors import UsageError
from rotquant_tvm.formats import KVFormat


@pytest.fixture(scope="module")
def compiled():
    return KVFormat.parse("turbo3:ip").codec(64, 1).compile("llvm")


@pytest.fixture
def vectors():
    return np.random.default_rng(0).standard_normal((500, 64)).astype(np.float32)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, tvm.runtime.tensor])
def test_search_ranks_by_the_estimated_inner_product(compiled, vectors, kind):
    base, queries = vectors[:467], vectors[467:]
    index = compiled.index(kind(base))
    assert len(index) == 467 and index.nbytes == 15 * 32 * 26
    codec = compiled.codec
    np.testing.assert_array_equal(index.encoded().gain.shape, (467, 1))
    expected = codec.score(queries.astype(float), index.encoded())
    scores = index.scores(kind(queries))
    assert type(scores) is type(kind(queries)) and tuple(scores.shape) == (33, 467)
    np.testing.assert_allclose(scores if kind is np.asarray else scores.numpy(), expected, atol=1e-4)
    ids, best = index.search(kind(queries), 5)
    assert ids.dtype == np.int64 and best.dtype == np.float32
    np.testing.assert_allclose(best, -np.sort(-expected, axis=1)[:, :5], atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(expected, ids, 1), best, atol=1e-4)


def test_most_neighbours_are_the_true_ones(compiled, vectors):
    base, queries = vectors, vectors[:100] + 0.3 * np.random.default_rng(1).standard_normal((100, 64))
    ids, _ = compiled.index(base).search(queries, 1)
    assert (ids[:, 0] == (queries @ base.T).argmax(1)).mean() > 0.97


def test_fewer_vectors_than_neighbours(compiled, vectors):
    index = compiled.index(vectors[:3])
    ids, scores = index.search(vectors[:2], 10)
    assert ids.shape == scores.shape == (2, 3) and (np.sort(ids, axis=1) == [0, 1, 2]).all()
    assert (np.diff(scores, axis=1) <= 0).all()
    empty = compiled.index(vectors[:0])
    assert len(empty) == empty.nbytes == 0 and empty.search(vectors[:2], 4)[0].shape == (2, 0)
    assert index.search(vectors[:0], 2)[0].shape == (0, 2)


def test_a_format_with_a_sketch(vectors):
    codec = KVFormat.parse("turbo3+qjl").codec(64, 1)
    index = codec.compile("llvm").index(vectors)
    assert index.nbytes == 16 * 32 * 64 * 3.5 / 8
    np.testing.assert_allclose(index.scores(vectors), codec.score(vectors.astype(float), index.encoded()), atol=3e-4)


def test_refusals(compiled, vectors):
    with pytest.raises(UsageError, match=r"vectors have shape \[4, 32\]; an index takes \[n, 64\]"):
        compiled.index(np.zeros((4, 32)))
    index = compiled.index(vectors)
    with pytest.raises(UsageError, match=r"queries have shape \[64\]; the index takes \[m, 64\]"):
        index.scores(np.zeros(64))
    with pytest.raises(UsageError, match="k is 0; ask for 1 neighbour or more"):
        index.search(vectors, 0)
