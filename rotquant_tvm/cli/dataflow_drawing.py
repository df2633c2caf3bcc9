"""The dataflow around a site as an SVG picture: before the passes at the left, after them at the right."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING

import networkx as nx

from rotquant_tvm.cli.site_drawing import with_tooltips

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "attention": "#b7dfb9",
    "kernel": "#cfe8f7",
    "operator": "#ffffff",
    "weight": "#e8edf2",
    "cache": "#f7e3b5",
    "input": "#f4f1ea",
}
MEANINGS = {
    "attention": "attention",
    "kernel": "kernel of the packed cache",
    "operator": "operator of the model",
    "weight": "weight (rotated: it has taken a rotation over)",
    "cache": "stored keys and values",
    "input": "computed elsewhere",
}
_ROW, _COLUMN, _MARGIN = 0.62, 2.3, 1.2  # inches
Place = tuple[float, float]


def draw_dataflow(panels: dict[str, nx.DiGraph | str], title: str) -> bytes:
    """Draw graphs of ``site_dataflow`` side by side, by their headings; a text stands where there is no graph.

    The same graphs give the same bytes.
    """
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dataflow", "font.family": "sans-serif"}):
        figure, tooltips = _figure(panels, title)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return with_tooltips(buffer.getvalue(), tooltips)


def _figure(panels: dict[str, nx.DiGraph | str], title: str) -> tuple[Figure, dict[str, str]]:
    """The picture, and the tooltips of its nodes by their ids."""
    from matplotlib.figure import Figure

    places = {heading: {} if isinstance(panel, str) else layered(panel) for heading, panel in panels.items()}
    widths = {heading: _COLUMN * (1 + max((x for x, _ in at.values()), default=1)) for heading, at in places.items()}
    width = sum(widths.values())
    height = 2 * _MARGIN + _ROW * max((y for at in places.values() for _, y in at.values()), default=1)
    figure = Figure((width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(0.2, 0.35, title, fontsize=13, ha="left")
    tooltips: dict[str, str] = {}
    left = 0.0
    for number, (heading, panel) in enumerate(panels.items()):
        axes.text(left + 0.2, 0.75, heading, fontsize=11, ha="left", weight="bold")
        if isinstance(panel, str):
            reason = "\n".join(textwrap.wrap(panel, 48))
            axes.text(left + 0.2, _MARGIN, reason, fontsize=9, ha="left", va="top", color="#833")
        else:
            tooltips |= _draw_panel(axes, panel, places[heading], left, f"panel-{number}")
        left += widths[heading]
    _draw_legend(axes, height)
    return figure, tooltips


def layered(graph: nx.DiGraph) -> dict[int, Place]:
    """Return a place (column, row) for every node: users below what they read, near it; no two at one place."""
    rows: dict[int, int] = {}
    for node in nx.topological_sort(graph):
        rows[node] = 1 + max((rows[before] for before in graph.predecessors(node)), default=-1)
    for node in rows:
        if graph.in_degree(node) == 0 and graph.out_degree(node):  # a leaf stands right above its first user
            rows[node] = min(rows[user] for user in graph.successors(node)) - 1
    by_row: dict[int, list[int]] = {}
    for node in sorted(rows):
        by_row.setdefault(rows[node], []).append(node)
    columns = {node: float(i) for nodes in by_row.values() for i, node in enumerate(nodes)}
    for _ in range(8):
        for nodes in by_row.values():
            wanted = {node: _mean(columns, nx.all_neighbors(graph, node), columns[node]) for node in nodes}
            _spread(columns, sorted(nodes, key=lambda node: (wanted[node], node)), wanted)
    least = min(columns.values(), default=0.0)
    return {node: (columns[node] - least, float(rows[node])) for node in rows}


def _mean(columns: dict[int, float], nodes: object, default: float) -> float:
    found = [columns[node] for node in nodes]  # type: ignore[attr-defined]
    return sum(found) / len(found) if found else default


def _spread(columns: dict[int, float], nodes: list[int], wanted: dict[int, float]) -> None:
    """Place the nodes of a row in order, at least one column apart, with the mean where it was wanted."""
    last = float("-inf")
    for node in nodes:
        last = columns[node] = max(wanted[node], last + 1)
    shift = sum(wanted[node] - columns[node] for node in nodes) / len(nodes)
    for node in nodes:
        columns[node] += shift


def _draw_panel(axes: Axes, graph: nx.DiGraph, places: dict[int, Place], left: float, prefix: str) -> dict[str, str]:
    """Draw one graph; returns the tooltips by the ids of its nodes."""
    at = {node: (left + _COLUMN * (x + 0.5), _MARGIN + _ROW * y) for node, (x, y) in places.items()}
    for before, after in graph.edges:
        arrow = {"arrowstyle": "-|>", "color": "#778", "shrinkA": 9, "shrinkB": 9, "linewidth": 0.8}
        axes.annotate("", at[after], at[before], arrowprops=arrow)
    tooltips = {}
    for node, data in graph.nodes(data=True):
        box = {"boxstyle": "round,pad=0.35", "facecolor": COLOURS[data["kind"]], "edgecolor": "#556"}
        label = axes.text(*at[node], data["label"], fontsize=8, ha="center", va="center", bbox=box, zorder=3)
        label.set_gid(f"{prefix}-{node}")
        tooltips[f"{prefix}-{node}"] = data["detail"]
    return tooltips


def _draw_legend(axes: Axes, height: float) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=COLOURS[kind], edgecolor="#556", label=text) for kind, text in MEANINGS.items()]
    legend = axes.legend(handles=handles, loc="lower left", ncols=3, fontsize=8, frameon=False)
    legend.set_bbox_to_anchor((0.1, height - 0.1), axes.transData)
