"""Pictures of an evaluation as SVG: KL divergence against bits, and the error of every layer."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rotquant_tvm.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PARTS = {"both": "keys and values", "k": "keys only", "v": "values only"}


def require_matplotlib() -> None:
    """Raise UsageError if pictures cannot be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the HTML report needs the package matplotlib: pip install 'rotquant-tvm[plots]'")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (bits, error) that no other point beats in both, by ascending bits."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def draw_pareto(points: Mapping[str, tuple[float, float, float]], bits_at: int) -> bytes | None:
    """Draw KL against true bits per element, log y, as SVG.

    ``points``: (bits, KL in nats, its standard error) by configuration; ``bits_at``: the length in tokens that the bits
    are counted at. Configurations without divergence cannot be drawn; None if none is left.
    """
    shown = {label: point for label, point in points.items() if point[1] > 0}
    if not shown:
        return None
    figure = _figure(7.6, 4.6)
    axes = figure.add_subplot()
    bits, kls, errors = (list(column) for column in zip(*shown.values(), strict=True))
    bars = [0.0 if math.isnan(e) else min(e, 0.95 * kl) for e, kl in zip(errors, kls, strict=True)]
    axes.errorbar(bits, kls, yerr=bars, fmt="o", color="#1f5fa8", ecolor="#9bb8d8", capsize=2)
    front = pareto_front(list(zip(bits, kls, strict=True)))
    axes.plot([bits[i] for i in front], [kls[i] for i in front], color="#c0392b", linewidth=1, label="Pareto front")
    for label, x, y in zip(shown, bits, kls, strict=True):
        axes.annotate(label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel(f"true bits per element of K and V, at {bits_at:,} tokens")
    axes.set_ylabel("mean KL(f16 ‖ quantized), nats per token")
    axes.margins(x=0.15)
    axes.grid(True, which="both", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def draw_layers(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes | None:
    """Draw relative errors {both, k, v} of every layer, by configuration, as three heat maps in SVG.

    The colours span the two decades below the largest error; exact layers stay blank. None if no layer has an error.
    """
    from matplotlib.colors import LogNorm

    layers = max(len(errors) for errors in rows.values())
    values = [error[part] for errors in rows.values() for error in errors for part in _PARTS if error[part] > 0]
    if not values:
        return None
    norm = LogNorm(max(values) / 100, max(values), clip=True)
    figure = _figure(max(6.0, 0.26 * layers + 2.6), 3 * (0.28 * len(rows) + 0.75))
    for place, (part, title) in enumerate(_PARTS.items(), 1):
        axes = figure.add_subplot(3, 1, place)
        grid = [[e[part] if e[part] > 0 else math.nan for e in errors] for errors in rows.values()]
        image = axes.imshow(grid, aspect="auto", norm=norm, cmap="magma_r", interpolation="nearest")
        _name_axes(axes, title, list(rows), layers)
        figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)
    return _svg(figure)


def _name_axes(axes: Axes, title: str, labels: list[str], layers: int) -> None:
    axes.set_title(f"{title} quantized", loc="left", fontsize=9)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    step = max(1, layers // 15)
    axes.set_xticks(range(0, layers, step), [str(i) for i in range(0, layers, step)], fontsize=8)
    axes.set_xlabel("layer", fontsize=8)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "evaluation"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def summary_points(protocol: Mapping[str, Any], bits: Mapping[str, float]) -> dict[str, tuple[float, float, float]]:
    """Return (bits, KL, standard error) by configuration from a protocol's rows."""
    return {row["label"]: (bits[row["label"]], row["kl"], row["kl_standard_error"]) for row in protocol["rows"]}
