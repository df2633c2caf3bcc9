"""The dataflow around one site: what belongs to it, what each node is, and where the walk ends."""

from __future__ import annotations

import networkx as nx
import pytest

from rotquant_tvm.cli.site_dataflow import KINDS, site_dataflow

from ..passes.fold_models import GPT2, LLAMA, FoldModel


def labels(graph: nx.DiGraph, kind: str) -> list[str]:
    return sorted(data["label"] for _, data in graph.nodes(data=True) if data["kind"] == kind)


@pytest.mark.parametrize("index", [0, 1])
def test_a_site_reaches_from_linear_layer_to_linear_layer(index):
    graph = site_dataflow(FoldModel(layers=2).module(), "main", index)
    assert nx.is_directed_acyclic_graph(graph) and nx.is_weakly_connected(graph)
    first = 2 + 4 * index
    assert labels(graph, "weight") == [f"w{first + i}" for i in range(4)]
    assert labels(graph, "cache") == [f"past_k_{index}", f"past_v_{index}"]
    assert labels(graph, "attention") == ["nn.attention"] and labels(graph, "input") == ["add (hidden states)"]
    (attention,) = (node for node, data in graph.nodes(data=True) if data["kind"] == "attention")
    assert len(nx.ancestors(graph, attention)) > 8
    assert [graph.nodes[node]["label"] for node in nx.descendants(graph, attention)] == ["reshape", "matmul"]
    assert all(data["kind"] in KINDS and "Tensor" in data["detail"] for _, data in graph.nodes(data=True))


def test_a_rotary_embedding_is_shown_and_its_angles_are_inputs():
    graph = site_dataflow(LLAMA.module(), "main", 0)
    assert "expand_dims of positions" in labels(graph, "input") and "cos" not in labels(graph, "operator")
    assert labels(graph, "operator").count("negative") == 2  # of queries and of keys


def test_one_packed_weight_with_its_bias():
    graph = site_dataflow(GPT2.module(), "main", 0)
    assert labels(graph, "weight") == ["w2", "w3", "w4"] and labels(graph, "operator").count("split") == 1


def test_there_is_no_such_site():
    with pytest.raises(IndexError):
        site_dataflow(LLAMA.module(), "main", 3)
