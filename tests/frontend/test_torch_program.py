"""Exported programs of every form compute what torch computes, imported and compiled."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tvm

import rotquant_tvm
from rotquant_tvm.frontend import from_torch
from rotquant_tvm.frontend.canonical_form import check_canonical
from rotquant_tvm.frontend.torch_program import program_step
from rotquant_tvm.kv_cache_config import KVCacheConfig

from ..sampling import sampled
from .fake_quantized import converse, replay
from .program_runner import CanonicalRun, run_step
from .torch_modules import HEAD_DIM, HEADS, KV_HEADS, LAYERS, LENGTH, VOCABULARY
from .torch_program_cases import CASES, MORE_CASES, exported, torch_logits, transformers_model

IDS = np.random.default_rng(3).integers(3, VOCABULARY, (2, 26))
CHUNKS = [(0, 9), (9, 14), *((n, n + 1) for n in range(14, 22))]


@functools.cache
def imported(name: str):
    return from_torch(exported(name))


def _rows(name: str) -> int:
    """Two rows, or as many as the program has."""
    batch = imported(name).mod["main"].params[0].ty.shape.values[0]
    return int(batch) if isinstance(batch, tvm.tirx.IntImm) else 2


TOLERANCES = {"cache-half": 3e-3, "cache-bfloat16": 3e-2}
ORDINARY = ("past", "plain", "static")


@pytest.mark.parametrize("name", sampled(CASES | MORE_CASES, ORDINARY))
def test_two_chunks_and_eight_tokens_give_the_logits_of_torch(name):
    model, ids = imported(name), IDS[: _rows(name)]
    kv_heads = HEADS if name == "gpt2-tuples" else KV_HEADS
    assert model.config["layers"] == [(kv_heads, HEADS, HEAD_DIM)] * LAYERS
    assert model.config["vocab_size"] == VOCABULARY
    check_canonical(model.mod, LAYERS)
    expected = torch_logits(name, ids)
    tolerance = TOLERANCES.get(name, 2e-5) * np.abs(expected).max()
    run = CanonicalRun(model, len(ids))
    for start, stop in CHUNKS:
        logits = run.step(ids[:, start:stop])
        np.testing.assert_allclose(logits, expected[:, stop - 1], atol=tolerance)
    assert all(past.shape == (len(ids), kv_heads, 22, HEAD_DIM) for past in run.pasts)


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_compiled_with_a_16_bit_cache_it_gives_the_logits_of_torch(name):
    rows = _rows(name)
    session = rotquant_tvm.compile(imported(name), "f16").session(batch=rows, capacity=32)
    expected = torch_logits(name, IDS)
    ends = np.zeros(rows, int)
    for first, second in [(9, 5), (5, 8), *((1, 1),) * 8]:
        new = [row[end : end + count] for row, end, count in zip(IDS, ends, (first, second), strict=False)]
        ends += [len(part) for part in new]
        given = [part.astype(np.int32) for part in new]
        logits = session.decode(np.concatenate(given)) if first == 1 else session.prefill(given)
        wanted = np.stack([expected[row, end - 1] for row, end in enumerate(ends)])
        np.testing.assert_allclose(logits, wanted, atol=5e-4 * np.abs(expected).max())


@pytest.mark.full
def test_compiled_in_3_bits_it_gives_the_logits_of_torch_over_the_stored_codes():
    config = KVCacheConfig.parse("hurwitz3")
    session = rotquant_tvm.compile(imported("cache"), config).session(batch=2, capacity=96)
    turns = converse(session, config, HEAD_DIM, decoded=8)
    model = transformers_model("Llama")
    expected, others, furthest = replay(model, turns, config, (None, None))
    stored = sum(len(turn.ids[row]) for turn in turns for row in range(2)) * 2 * LAYERS * KV_HEADS * HEAD_DIM
    assert others <= 1e-3 * stored and furthest < 1e-2
    for turn, wanted in zip(turns, expected, strict=True):
        np.testing.assert_allclose(turn.logits, wanted, atol=2e-4 * np.abs(wanted).max())


def test_state_is_in_inputs_and_outputs_under_its_own_names():
    graph = program_step(exported("buffers"), "a program")
    caches = [f"caches.{layer}.{kind}_cache" for layer in range(LAYERS) for kind in "kv"]
    assert graph.inputs == ["idx", "input_pos", *caches]
    assert graph.outputs[1:] == caches
    assert set(graph.weight_names) == {name for name, _ in CASES["buffers"].module().named_parameters()}

    empty = {name.replace(".", "__"): np.zeros((1, KV_HEADS, LENGTH, HEAD_DIM), np.float32) for name in caches}
    outputs = run_step(graph, idx=IDS[:1, :4], input_pos=np.arange(7, 11), **empty)
    for name in caches:
        written = np.abs(outputs[name]).max(axis=(0, 1, 3)) > 0
        np.testing.assert_array_equal(np.flatnonzero(written), np.arange(7, 11))


def test_what_a_call_overwrites_unread_is_no_state():
    graph = program_step(exported("static"), "a program")
    caches = [f"{kind}_cache_{layer}" for layer in range(LAYERS) for kind in ("key", "value")]
    assert graph.inputs == ["input_ids", "cache_position", *caches]  # without the counters cumulative_length_0, …
    assert graph.outputs[1:] == caches


def test_weights_are_the_programs_own_memory_and_tied_ones_are_one():
    program = exported("plain")
    model = imported("plain")
    assert "tokens.weight" not in model.weight_names or "head.weight" not in model.weight_names
    assert sum(weight.shape == (VOCABULARY, 128) for weight in model.weights) == 1
    for name, weight in zip(model.weight_names, model.weights, strict=True):
        assert np.shares_memory(weight, program.state_dict[name].detach().numpy())


@pytest.mark.parametrize("name", sampled(["static", "static-not-strict"], ("static",)))
def test_the_program_is_left_as_it_was(name):
    program = exported(name)
    before = (str(program.graph), str(program.graph_signature), sorted(program.constants))
    program_step(program, "a program")
    assert (str(program.graph), str(program.graph_signature), sorted(program.constants)) == before
