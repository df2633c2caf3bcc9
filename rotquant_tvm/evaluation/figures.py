"""How the figures of a text protocol are written, the same in tables and reports."""

from __future__ import annotations

from typing import Any


def figure_cells(row: dict[str, Any]) -> list[str]:
    """Return a row's perplexity, its change, KL, its standard error, top-1 agreement, tokens and seconds."""
    return [
        f"{row['perplexity']:.3f}",
        f"{100 * row['perplexity_change']:+.2f} %",
        f"{row['kl']:.5f}",
        f"{row['kl_standard_error']:.5f}",
        f"{100 * row['top1_agreement']:.2f} %",
        f"{row['tokens']:,}",
        f"{row['seconds']:.1f}",
    ]
