"""The logits are found, and computed for one token of each row or for all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tvm import relax

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize import normalize_step
from rotquant_tvm.frontend.step_graph import SOFTCAPS

from .numpy_step import CanonicalRun, SourceRun, compare
from .tiny_step import VOCAB, WIDTH, tiny_graph


def _products(imported):
    """Shapes of the products with the output layer's weight."""
    function = imported.mod["main"]
    calls = [v for v in relax.analysis.get_var2val(function).values() if isinstance(v, relax.Call)]
    products = [c for c in calls if c.op.name == "relax.matmul" and c.args[1].name == "head"]
    return [[str(size) for size in call.ty.shape.values] for call in products]


@pytest.mark.parametrize("logits", ["plain", "merged", "capped", "last"])
def test_the_output_layer_sees_one_token_of_each_row(logits):
    graph = tiny_graph(logits=logits, layers=1)
    imported = normalize_step(graph)
    compare(graph, imported)
    assert "seq" not in str(_products(imported)) and imported.config["vocab_size"] == VOCAB


def test_any_token_of_each_row():
    graph = tiny_graph(layers=1)
    ids = np.random.default_rng(0).integers(0, VOCAB, (3, 5))
    logits = SourceRun(graph, 3).step(ids)
    chosen = CanonicalRun(normalize_step(graph), 3).step(ids, last=np.array([4, 0, 2]))
    np.testing.assert_allclose(chosen, logits[np.arange(3), [4, 0, 2]], 2e-4, 2e-4)


@pytest.mark.parametrize("logits", ["plain", "capped"])
def test_every_logit(logits):
    graph = tiny_graph(logits=logits, layers=1)
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, 5))
    every = CanonicalRun(normalize_step(graph, every_logit=True), 2).step(ids)
    np.testing.assert_allclose(every, SourceRun(graph, 2).step(ids), 2e-4, 2e-4)


def test_every_logit_of_a_source_that_has_the_last_ones_alone_is_refused():
    with pytest.raises(ModelError, match="the logits of the last token alone"):
        normalize_step(tiny_graph(logits="last", layers=1), every_logit=True)


def test_other_outputs_are_dropped_and_named():
    graph = tiny_graph(layers=1, hidden_output=True)
    imported = normalize_step(graph)
    assert imported.config["dropped_outputs"] == ["hidden_state"]
    compare(graph, imported)


def test_logits_are_told_from_hidden_states_by_the_vocabulary():
    graph = tiny_graph(layers=1, hidden_output=True)
    imported = normalize_step(replace(graph, outputs=["a", "b", *graph.outputs[2:]]))
    assert imported.config["vocab_size"] == VOCAB != WIDTH
    assert imported.config["dropped_outputs"] == ["a"]


def test_no_logits():
    with pytest.raises(ModelError, match=r"no output holds logits .* \['logits', 'present.0', 'present.1'\]"):
        normalize_step(tiny_graph(layers=1, logits="flat"))
    with pytest.raises(ModelError, match="no attention was found"):
        normalize_step(tiny_graph(layers=1, order=[1, 2]))


def test_facts_of_the_source_are_kept_and_unused_weights_are_not():
    graph = tiny_graph(layers=1, softcaps=[30.0], config={"model_type": "tiny", "max_position": 40})
    imported = normalize_step(graph)
    assert imported.config["model_type"] == "tiny" and imported.config["max_position"] == 40
    assert [float(cap) for cap in imported.mod["main"].attrs[SOFTCAPS]] == [30.0]
    assert "unused" not in imported.weight_names and "embed" in imported.weight_names
    given = dict(zip(graph.weight_names, graph.weights, strict=True))
    assert all(given[n] is w for n, w in zip(imported.weight_names, imported.weights, strict=True))
    compare(graph, imported)
