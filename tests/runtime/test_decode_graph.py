"""Decode as a CUDA graph, through sessions; needs a GPU."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import tvm

import rotquant_tvm
from rotquant_tvm.runtime.cuda_graph import CUDAGraph
from rotquant_tvm.runtime.decode_graph import DecodeGraph

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not tvm.cuda(0).exist, reason="no CUDA device")]
VOCABULARY = 259


@pytest.fixture(scope="module")
def library():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).half().eval()
    return rotquant_tvm.compile(rotquant_tvm.from_torch(model), "rq3", "cuda").library("cuda")


def filled(library, batch, tokens=70):
    session = library.session(batch, 200)
    session.prefill(np.random.default_rng(0).integers(0, VOCABULARY, (batch, tokens)))
    return session


def steps(session, count, rng):
    return [session.decode(rng.integers(0, VOCABULARY, session.batch)) for _ in range(count)]


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_replays_are_what_launches_are(library, batch):
    graph, eager = filled(library, batch), filled(library, batch)
    eager.instrument(lambda *_: 0)  # an instrument is to see every kernel
    one, other = (steps(session, 40, np.random.default_rng(1)) for session in (graph, eager))
    assert graph._graph is not None and eager._graph is None
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(graph.lengths, eager.lengths)
    np.testing.assert_array_equal(graph.cache.device_lengths(), graph.lengths)


def test_other_sessions_do_not_disturb_a_graph(library):
    alone, beside = filled(library, 2), filled(library, 2)
    expected = steps(alone, 20, np.random.default_rng(1))
    rng, seen = np.random.default_rng(1), []
    for number in range(20):
        seen += steps(beside, 1, rng)
        steps(filled(library, 1 + number % 4, 20 + 7 * number), 3, np.random.default_rng(number))
    np.testing.assert_array_equal(seen, expected)


def test_a_session_goes_on_after_crop_prefill_reset_and_reorder(library):
    graph, eager = filled(library, 2), filled(library, 2)
    eager.instrument(lambda *_: 0)
    results = []
    for session in (graph, eager):
        rng = np.random.default_rng(2)
        seen = steps(session, 5, rng)
        session.crop(session.lengths - 2)
        seen += steps(session, 3, rng)
        seen.append(session.prefill(rng.integers(0, VOCABULARY, (2, 9))))
        seen += steps(session, 3, rng)
        session.reorder([1, 0, 1])
        seen += steps(session, 4, rng)[1:]
        session.reset(2)
        session.prefill(rng.integers(0, VOCABULARY, (2, 9)))
        results.append(seen + steps(session, 3, rng))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_graph_goes_with_its_session(library):
    session = filled(library, 1)
    steps(session, 3, np.random.default_rng(0))
    graph = weakref.ref(session._graph)
    del session
    gc.collect()
    assert graph() is None


def test_it_records_without_running(library):
    session = filled(library, 1)
    steps(session, 1, np.random.default_rng(0))
    DecodeGraph(library, session.cache)
    np.testing.assert_array_equal(session.cache.device_lengths(), session.lengths)


def test_an_error_ends_the_recording():
    def fail():
        raise ValueError("not to be recorded")

    with pytest.raises(ValueError, match="not to be recorded"):
        CUDAGraph(tvm.cuda(0), fail)
    array = tvm.runtime.tensor(np.arange(4), tvm.cuda(0))
    np.testing.assert_array_equal(array.numpy(), np.arange(4))
