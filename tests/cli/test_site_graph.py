"""The graph of attention sites: which weights stand behind query, key and value, and what reads the result."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import pytest

from rotquant_tvm.cli.site_graph import site_graph
from rotquant_tvm.frontend import ImportedModel, import_model


@pytest.fixture(scope="module")
def llama(model) -> ImportedModel:
    return import_model(model)


def gpt2() -> ImportedModel:
    """Keys, queries and values come from one packed product."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    return import_model(transformers.GPT2LMHeadModel(config).eval())


def graph_of(imported: ImportedModel, **changes) -> nx.DiGraph:
    from rotquant_tvm.passes.find_attention import find_attention

    return site_graph(imported, [replace(site, **changes) for site in find_attention(imported.mod["main"])])


def test_each_role_has_its_weight(llama):
    graph = graph_of(llama)
    for layer in range(2):
        for column, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj")):
            data = graph.nodes[layer, column]
            assert data["label"] == f"self_attn.{name}" and data["row"] == layer and data["column"] == column
            assert f"model.layers.{layer}.self_attn.{name}.weight" in data["detail"]
        attention = (layer, "attention")
        assert set(graph.predecessors(attention)) == {(layer, role) for role in ("query", "key", "value")}
        assert set(graph.successors(attention)) == {(layer, "output")}
    assert list(graph.successors((0, "output"))) == [(1, "query")]  # the second layer reads the first
    assert len(graph) == 10 and nx.is_directed_acyclic_graph(graph)


def test_one_weight_for_all_roles_is_one_node():
    graph = graph_of(gpt2())
    assert set(graph.predecessors((1, "attention"))) == {(1, "query")}
    assert graph.nodes[1, "query"]["label"] == "attn.c_attn (query, key, value)"
    assert graph.nodes[1, "output"]["label"] == "attn.c_proj" and (1, "key") not in graph


def test_attention_says_its_shape_and_verdict(llama):
    data = graph_of(llama).nodes[0, "attention"]
    assert data["label"] == "0 · 2/1 heads × 32 · causal"
    assert data["site"]["verdict"] == "quantize" and data["detail"].endswith(": quantize")
    kept = graph_of(llama, window=7, reason="it is odd").nodes[1, "attention"]
    assert kept["label"].endswith("window 7") and kept["detail"].endswith(": refuse: it is odd")
