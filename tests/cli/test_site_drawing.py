"""The picture of attention sites: one row per site, colours, tooltips, legend, and no picture without matplotlib."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import networkx as nx
import pytest

from rotquant_tvm.cli import site_drawing
from rotquant_tvm.cli.site_drawing import COLOURS, draw_sites
from rotquant_tvm.cli.site_graph import COLUMNS

SVG = "{http://www.w3.org/2000/svg}"


def graph(sites: int, kept: dict[int, str]) -> nx.DiGraph:
    """Sites of one shape; ``kept`` are the reasons of those that cannot be rewritten."""
    made = nx.DiGraph()
    for row in range(sites):
        for column in COLUMNS:
            data = {"column": column, "row": row, "label": f"{column}-{row}"}
            data["detail"] = f"all about {column} <{row}> & more"
            if column == "attention":
                reason = kept.get(row, "")
                data["site"] = {"verdict": "refuse" if reason else "quantize", "reason": reason}
            made.add_node((row, column), **data)
        for column in ("query", "key", "value"):
            made.add_edge((row, column), (row, "attention"))
        made.add_edge((row, "attention"), (row, "output"))
        if row:
            made.add_edge((row - 1, "output"), (row, "query"))
    return made


def groups(svg: bytes) -> dict[str, ET.Element]:
    """The groups of the picture that stand for nodes."""
    root = ET.fromstring(svg)
    return {g.get("id"): g for g in root.iter(f"{SVG}g") if g.get("id", "").startswith("site-")}


def text_height(group: ET.Element) -> float:
    """Where the group's label stands: SVG's y, from the top down."""
    text = next(group.iter(f"{SVG}text"))
    place = text.get("y") or re.search(r"translate\([-\d.]+[ ,]+([-\d.]+)\)", text.get("transform"))[1]
    return float(place)


def test_every_node_is_there_with_its_tooltip():
    found = groups(draw_sites(graph(3, {}), "three sites"))
    assert set(found) == {f"site-{row}-{column}" for row in range(3) for column in COLUMNS}
    for name, group in found.items():
        _, row, column = name.split("-")
        assert group[0].tag == f"{SVG}title" and group[0].text == f"all about {column} <{row}> & more"
        assert next(group.iter(f"{SVG}text")).text == f"{column}-{row}"


def test_sites_are_rows_from_the_top_down_and_the_picture_grows_with_them():
    svg = draw_sites(graph(30, {}), "thirty sites")
    found = groups(svg)
    heights = [[text_height(found[f"site-{row}-{column}"]) for column in COLUMNS] for row in range(30)]
    assert all(max(row) - min(row) < 0.1 for row in heights)
    steps = [after[0] - before[0] for before, after in pairwise(heights)]
    assert min(steps) > 25 and max(steps) - min(steps) < 0.1  # points: more than two lines of the labels
    sizes = [float(ET.fromstring(s).get("height").removesuffix("pt")) for s in (svg, draw_sites(graph(3, {}), ""))]
    assert sizes[0] - sizes[1] == pytest.approx(27 * steps[0], rel=0.01)


def test_verdicts_are_colours_and_reasons_are_written_out():
    svg = draw_sites(graph(2, {1: "its mask is an operand"}), "two sites")
    found = groups(svg)
    for row, verdict in enumerate(("quantize", "refuse")):
        drawn = ET.tostring(found[f"site-{row}-attention"]).decode()
        assert [colour in drawn for colour in COLOURS.values()] == [name == verdict for name in COLOURS]
    texts = [text.text for text in ET.fromstring(svg).iter(f"{SVG}text")]
    assert "its mask is an operand" in texts and "two sites" in texts
    assert all(any((text or "").startswith(f"{name}: ") for text in texts) for name in COLOURS)  # the legend


def test_the_same_graph_is_the_same_picture():
    assert draw_sites(graph(2, {}), "a") == draw_sites(graph(2, {}), "a") != draw_sites(graph(2, {0: "x"}), "a")


def test_a_model_without_attention_is_an_empty_picture():
    assert groups(draw_sites(nx.DiGraph(), "nothing")) == {}


def test_inspect_writes_the_picture(tvmc, model, tmp_path):
    ended = tvmc("inspect", model, "--svg", tmp_path / "sites.svg", "--json")
    assert ended.status == 0, ended.err
    assert ended.document["svg"] == str(tmp_path / "sites.svg")
    found = groups((tmp_path / "sites.svg").read_bytes())
    assert {"site-0-attention", "site-1-attention", "site-1-value"} <= set(found)
    assert "model.layers.1.self_attn.v_proj.weight" in found["site-1-value"][0].text


def test_what_cannot_be_drawn_is_refused_before_the_model_is_read(tvmc, model, artifact_like, tmp_path, monkeypatch):
    def refused(*arguments) -> str:
        ended = tvmc("inspect", *arguments)
        assert ended.status == 2 and ended.out == "" and "load TVM" not in ended.err
        return ended.error

    assert "is an artifact" in refused(artifact_like, "--svg", tmp_path / "a.svg")
    assert "is a folder" in refused(model, "--svg", tmp_path)
    assert "cannot write" in refused(model, "--svg", tmp_path / "no" / "a.svg")
    monkeypatch.setattr(site_drawing.importlib.util, "find_spec", lambda _name: None)
    assert "pip install 'rotquant-tvm[plots]'" in refused(model, "--svg", tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()


@pytest.fixture
def artifact_like(tmp_path):
    """A folder that looks like an artifact."""
    folder = tmp_path / "model.rq"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    return folder
