"""A graph of attention sites as an SVG picture: one row per site, verdicts by colour, details as tooltips."""

from __future__ import annotations

import importlib.util
import io
import textwrap
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

from rotquant_tvm.cli.site_graph import COLUMNS
from rotquant_tvm.errors import UsageError

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"quantize": "#b7dfb9", "keep": "#f6e3a1", "refuse": "#f4b6a6"}
MEANINGS = {
    "quantize": "can have a packed KV cache",
    "keep": "its K or V stays in 16 bits (reason: tooltip, and at the right)",
    "refuse": "cannot be rewritten (reason: tooltip, and at the right)",
}
_PLAIN = "#e8edf2"
_ROW, _COLUMN, _MARGIN = 0.55, 2.6, 1.1  # inches
_BENDS = {"query": -0.075, "key": -0.11, "value": 0.0, "attention": 0.0}
_SVG = "http://www.w3.org/2000/svg"


def require_matplotlib() -> None:
    """Raise UsageError if pictures cannot be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--svg needs the package matplotlib: pip install 'rotquant-tvm[plots]'")


def draw_sites(graph: nx.DiGraph, title: str) -> bytes:
    """Draw a graph made by ``site_graph`` as SVG; the same graph gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sites", "font.family": "sans-serif"}):
        _figure(graph, title).savefig(buffer, format="svg", metadata={"Date": None})
    tooltips = {_id(node): detail for node, detail in graph.nodes(data="detail")}
    return with_tooltips(buffer.getvalue(), tooltips)


def _figure(graph: nx.DiGraph, title: str) -> Figure:
    from matplotlib.figure import Figure

    rows = 1 + max((row for _, row in graph.nodes(data="row")), default=0)
    width, height = _COLUMN * (len(COLUMNS) + 1), _ROW * rows + 2 * _MARGIN
    figure = Figure((width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-_COLUMN / 2, width - _COLUMN / 2), ylim=(height - _MARGIN, -_MARGIN))
    axes.axis("off")
    axes.text(-0.8, -0.85, title, fontsize=13, ha="left")
    _draw_headings(axes)
    _draw_nodes(axes, graph)
    _draw_edges(axes, graph)
    _draw_legend(axes, _ROW * rows)
    return figure


def _id(node: tuple[int, str]) -> str:
    return f"site-{node[0]}-{node[1]}"


def _position(data: dict[str, Any]) -> tuple[float, float]:
    return _COLUMN * COLUMNS.index(data["column"]), _ROW * data["row"]


def _draw_headings(axes: Axes) -> None:
    for index, column in enumerate(COLUMNS):
        axes.text(_COLUMN * index, -0.5, column, fontsize=10, ha="center", weight="bold")


def _draw_nodes(axes: Axes, graph: nx.DiGraph) -> None:
    for node, data in graph.nodes(data=True):
        x, y = _position(data)
        site = data.get("site")
        colour = COLOURS[site["verdict"]] if site else _PLAIN
        box = {"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": "#556"}
        label = axes.text(x, y, data["label"], fontsize=8, ha="center", va="center", bbox=box, zorder=3)
        label.set_gid(_id(node))
        if site and site["reason"]:
            reason = textwrap.shorten(site["reason"], 48, placeholder=" …")
            axes.text(_COLUMN * (len(COLUMNS) - 0.55), y, reason, fontsize=7, ha="left", va="center", color="#833")


def _draw_edges(axes: Axes, graph: nx.DiGraph) -> None:
    import networkx as nx

    positions = {node: _position(data) for node, data in graph.nodes(data=True)}
    common = {"ax": axes, "nodelist": [], "node_size": 900, "arrowsize": 8, "edge_color": "#778"}
    margins = {"min_source_margin": 38, "min_target_margin": 62}  # points: half a box
    for column, bend in _BENDS.items():
        edges = [(a, b) for a, b in graph.edges if graph.nodes[a]["column"] == column]
        style = f"arc3,rad={bend}"
        nx.draw_networkx_edges(graph, positions, edgelist=edges, connectionstyle=style, **margins, **common)
    residual = [(a, b) for a, b in graph.edges if graph.nodes[a]["column"] == "output"]
    nx.draw_networkx_edges(graph, positions, edgelist=residual, style="dotted", alpha=0.35, **common)


def _draw_legend(axes: Axes, y: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    meanings = {colour: f"{verdict}: {MEANINGS[verdict]}" for verdict, colour in COLOURS.items()}
    meanings[_PLAIN] = "a weight, or what else makes or reads the tensor"
    handles: list[Any] = [Patch(facecolor=colour, edgecolor="#556", label=text) for colour, text in meanings.items()]
    handles.append(Line2D([], [], linestyle="dotted", color="#778", label="a later site depends on it"))
    legend = axes.legend(handles=handles, loc="upper left", ncols=2, fontsize=8, frameon=False)
    legend.set_bbox_to_anchor((0.0, y), axes.transData)


def with_tooltips(svg: bytes, tooltips: dict[str, str]) -> bytes:
    """Give the groups of these ids a ``title``, which browsers show under the pointer."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(svg)
    for group in root.iter(f"{{{_SVG}}}g"):
        if (detail := tooltips.get(group.get("id", ""))) is not None:
            title = ET.Element(f"{{{_SVG}}}title")
            title.text = detail
            group.insert(0, title)
    document: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return document
