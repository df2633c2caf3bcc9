"""Prints how many inputs the fuzz tests tried."""

from __future__ import annotations

from .fuzzing import INPUTS


def pytest_terminal_summary(terminalreporter) -> None:
    """A line per thing that was fed."""
    if INPUTS:
        terminalreporter.write_sep("-", f"fuzzing: {sum(INPUTS.values())} inputs")
        for name, count in sorted(INPUTS.items()):
            terminalreporter.write_line(f"{count:8d}  {name}")
