"""The example's contenders and what it counts, on small random vectors."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("faiss", reason="needs faiss-cpu: pip install rotquant-tvm[search]")


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "nearest_neighbour.py"
    spec = importlib.util.spec_from_file_location("nearest_neighbour", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nearest_neighbour"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vectors():
    x = np.random.default_rng(0).standard_normal((1_300, 32)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_exact_scores_find_everything_and_reversed_ones_nothing(example, vectors):
    base, queries = vectors[:1_200], vectors[1_200:]
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        result = example.measure("x", lambda b, s=sign: (lambda q: s * q @ b.T, 128.0, 0.0, 0.0), base, queries)
        assert result.top1 == result.top1_in_10 == result.top10 == expected


@pytest.mark.parametrize("opq", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_product_quantizer_of_uneven_subspaces(example, vectors, opq):
    scores, nbytes, _, _ = example.product_quantizer(10, opq)(vectors[:1_200])
    result = scores(vectors[:1_200])
    exact = vectors[:1_200] @ vectors[:1_200].T
    assert nbytes == 10 and result.shape == exact.shape
    assert 0.02 < np.sqrt(((result - exact) ** 2).mean()) < 0.12


def test_ours_counts_its_true_bytes(example, vectors):
    scores, nbytes, train, _ = example.ours("dense4:ip")(vectors)
    assert nbytes == 32 * 4 / 8 + 2 and train == 0
    assert np.abs(scores(vectors[:9]) - vectors[:9] @ vectors.T).max() < 0.15


def test_queries_are_held_out(example):
    x = np.random.default_rng(1).standard_normal((1_500, 32)) * 3
    x[7] = 0
    base, queries = example.split(x)
    assert base.shape == (499, 32) and queries.shape == (1_000, 32)
    np.testing.assert_allclose(np.linalg.norm(base, axis=1), 1)
    assert not (base[:, None] == queries[:50]).all(-1).any()
