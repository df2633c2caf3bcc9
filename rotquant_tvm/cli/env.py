"""Show what this machine offers: versions, devices, compilers, folders, tuning logs, and what will be slow and why.

For example:
  tvmc env
  tvmc env --json > environment.json   (to go with a bug report)
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rotquant_tvm.cli.output import Output, table

if TYPE_CHECKING:
    from rich.table import Table

SUMMARY = "show versions, devices, compilers and what will be slow here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``tvmc env`` takes the common options alone."""


def execute(arguments: argparse.Namespace, output: Output) -> None:
    """Collect everything and show it."""
    document = _collect()
    output.result(document, *_shown(document))


def _collect() -> dict[str, Any]:
    from rotquant_tvm import environment

    installed, tools = environment.versions(), environment.compilers()
    processor, devices, logs = environment.cpu(), environment.gpus(), environment.tuning_logs()
    return {
        "versions": installed,
        "cpu": processor,
        "gpus": devices,
        "compilers": tools,
        "folders": environment.folders(),
        "tuning_logs": logs,
        "hints": [asdict(hint) for hint in environment.hints(installed, processor, devices, tools, logs)],
    }


def _shown(document: dict[str, Any]) -> list[Table | str]:
    processor = document["cpu"]
    rows: list[tuple[str, str]] = [(name, version or "not installed") for name, version in document["versions"].items()]
    rows.append(("cpu", f"{processor['name']}, {processor['cores']} cores, {processor['level']}"))
    rows += [
        (gpu["device"], f"{gpu['name']}, {gpu['arch']}, {gpu['memory'] / 2**30:.0f} GiB, driver {gpu['driver'] or '?'}")
        for gpu in document["gpus"]
    ]
    rows += [(name, command or "not found") for name, command in document["compilers"].items()]
    rows += list(document["folders"].items())
    rows += [
        ("tuning log", log.get("problem") or f"{log['slug']}: {log['records']} records, {log['folder']}")
        for log in document["tuning_logs"]
    ]
    hints = [[hint["topic"], hint["text"]] for hint in document["hints"]]
    shown: list[Table | str] = [table("", ["", ""], rows, left=2)]
    return [*shown, "", table("worth knowing", ["", ""], hints, left=2)] if hints else shown
