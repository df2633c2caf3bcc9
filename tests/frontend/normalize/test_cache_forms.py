"""Caches of every layout become concatenations, and what is none is refused by name."""

from __future__ import annotations

import pytest
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize import normalize_step

from . import mask_spellings as masks
from .numpy_step import compare
from .tiny_step import HEAD_DIM, HEADS, KV_HEADS, tiny_graph


@pytest.mark.parametrize("cache", ["bhsd", "bshd", "transposed", "merged", "packed"])
def test_layouts_of_a_growing_cache(cache):
    graph = tiny_graph(cache=cache)
    imported = normalize_step(graph)
    assert imported.config["layers"] == [(KV_HEADS, HEADS, HEAD_DIM)] * 2
    assert imported.config["dropped_outputs"] == []
    compare(graph, imported)


def test_a_cache_in_half_precision_rounds_what_is_new():
    graph = tiny_graph(cache="half")
    imported = normalize_step(graph)
    assert {str(param.ty.dtype) for param in imported.mod["main"].params[3:7]} == {"float32"}
    compare(graph, imported)


def test_a_buffer_written_at_positions():
    graph = tiny_graph(cache="static", mask=masks.causal())
    imported = normalize_step(graph)
    compare(graph, imported)


def test_a_buffer_that_is_seen_before_it_is_written_is_refused():
    with pytest.raises(ModelError, match="shows places of the cache that are not written yet"):
        normalize_step(tiny_graph(cache="static", mask=masks.everything))


def test_outputs_in_any_order():
    graph = tiny_graph(order=[3, 0, 2, 4, 1])
    imported = normalize_step(graph)
    compare(graph, imported)


@pytest.mark.parametrize("positions", ["shapes", "position_ids", "table_slice", "cumsum"])
def test_a_model_without_a_cache_is_given_one(positions):
    graph = tiny_graph(cache="none", positions=positions)
    compare(graph, normalize_step(graph))


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("rolling", "attention 0 .* is not its past joined with new tokens: attention reads 5 of 8 tokens"),
        ("reversed", "keys of attention 0 .* the new tokens are not behind the old ones"),
        ("cut", "keys of attention 0 .* the second call does not read what the first one|old ones are dropped"),
        ("cross", "keys of attention 0 .* are the input past_0.key as it is: cross-attention"),
        ("latent", r"keys of attention 0 .* computed from the past by relax.matmul .*latent"),
        ("scaled", r"keys of attention 0 .* computed from the past by relax.multiply"),
        ("shared", "keys of attention 1 .* are the keys of attention 0"),
        ("unreturned", "past_0.value is joined with new tokens, and no output returns the result"),
    ],
)
def test_what_is_no_concatenation_is_refused(cache, message):
    with pytest.raises(ModelError, match=message):
        normalize_step(tiny_graph(cache=cache))


def test_a_present_with_another_reader_is_refused():
    def leak(step, x):
        whole = step.emit(R.max(step.leak, axis=[1, 2, 3]))
        return step.emit(R.add(x, step.emit(R.reshape(whole, [step.batch, 1, 1]))))

    with pytest.raises(ModelError, match=r"cache of attention 0 .* is read outside its attention too, by relax.max"):
        normalize_step(tiny_graph(cache="leaking", layers=1, extra=leak))


@pytest.mark.parametrize("cache", ["merged", "packed"])
def test_pasts_and_new_tokens_have_the_canonical_shape(cache):
    function = normalize_step(tiny_graph(cache=cache, layers=1)).mod["main"]
    batch, seq = function.params[0].ty.shape.values
    joined = [v for v in relax.analysis.get_var2val(function).values() if _reads_past(v)]
    assert len(joined) == 2
    for call in joined:
        past, new = call.args[0]
        assert [str(size) for size in past.ty.shape.values] == [str(batch), "T.int64(2)", "past", "T.int64(32)"]
        assert [str(size) for size in new.ty.shape.values] == [str(batch), "T.int64(2)", str(seq), "T.int64(32)"]


def _reads_past(value):
    is_concat = isinstance(value, relax.Call) and getattr(value.op, "name", "") == "relax.concat"
    return is_concat and value.args[0][0].name.startswith("past_")
