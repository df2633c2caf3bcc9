"""The picture of a site's dataflow: users below producers, no two nodes at one place, tooltips, a text for a panel."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import networkx as nx
from hypothesis import given, settings
from hypothesis import strategies as st

from rotquant_tvm.cli.dataflow_drawing import COLOURS, MEANINGS, draw_dataflow, layered
from rotquant_tvm.cli.site_dataflow import KINDS

SVG = "{http://www.w3.org/2000/svg}"


def graph_of(edges: list[tuple[int, int]]) -> nx.DiGraph:
    graph = nx.DiGraph(edges)
    for node in graph:
        graph.nodes[node].update(kind=KINDS[node % len(KINDS)], label=f"n{node}", detail=f"v{node}: <Tensor> & more")
    return graph


EDGES = st.lists(st.tuples(st.integers(0, 14), st.integers(1, 8)).map(lambda e: (e[0], e[0] + e[1])), min_size=1)


@given(EDGES)
@settings(max_examples=40, deadline=None)
def test_users_stand_below_and_apart(edges):
    graph = graph_of(edges)
    places = layered(graph)
    assert set(places) == set(graph) and min(x for x, _ in places.values()) == 0
    for before, after in graph.edges:
        assert places[before][1] < places[after][1]
    rows: dict[float, list[float]] = {}
    for x, y in places.values():
        rows.setdefault(y, []).append(x)
    for row in rows.values():
        assert all(b - a > 0.99 for a, b in zip(sorted(row), sorted(row)[1:], strict=False))


def test_a_leaf_stands_right_above_its_first_user():
    places = layered(graph_of([(0, 1), (1, 2), (2, 3), (9, 3)]))
    assert places[9][1] == places[3][1] - 1


def test_two_panels_with_tooltips():
    graph = graph_of([(0, 1), (1, 2)])
    svg = draw_dataflow({"before": graph, "after": "refused: it is <odd>"}, "site 3")
    groups = {g.get("id"): g for g in ET.fromstring(svg).iter(f"{SVG}g") if g.get("id", "").startswith("panel-")}
    assert set(groups) == {"panel-0-0", "panel-0-1", "panel-0-2"}
    assert groups["panel-0-1"][0].text == "v1: <Tensor> & more"
    texts = [text.text for text in ET.fromstring(svg).iter(f"{SVG}text")]
    assert {"before", "after", "site 3", "refused: it is <odd>", *MEANINGS.values()} <= set(texts)
    assert COLOURS["attention"] in ET.tostring(groups["panel-0-0"]).decode()
    assert svg == draw_dataflow({"before": graph, "after": "refused: it is <odd>"}, "site 3")


def test_every_kind_has_a_colour_and_a_meaning():
    assert set(COLOURS) == set(MEANINGS) == set(KINDS)
