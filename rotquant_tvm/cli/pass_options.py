"""Options about passes: print the module around them, time them, leave them out, configure them."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from rotquant_tvm.cli.options import words
from rotquant_tvm.cli.output import Output, table
from rotquant_tvm.errors import UsageError

if TYPE_CHECKING:
    import tvm
    from rich.table import Table

    from rotquant_tvm.pass_hooks import PassHooks, PassTimer

_BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "on": True, "off": False}


def add_pass_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about passes."""
    group = parser.add_argument_group("passes")
    group.add_argument(
        "-O",
        "--opt-level",
        dest="opt_level",
        metavar="LEVEL",
        type=int,
        choices=range(4),
        default=3,
        help="TVM's optimization level, 0 to 3 (default: 3)",
    )
    group.add_argument(
        "--pass-config",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="configure TVM's passes, as in tirx.disable_vectorize=true (may be repeated)",
    )
    for option, what in (
        ("--disabled-pass", "leave these passes out"),
        ("--print-ir-before", "print the module before these passes"),
        ("--print-ir-after", "print the module after these passes"),
    ):
        group.add_argument(option, metavar="PASS,…", type=words(), default=[], help=what)
    group.add_argument("--print-pass-times", action="store_true", help="show how long each pass took")


def pass_config(pairs: list[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` texts; values are true, false, integers or JSON objects. Raises UsageError."""
    config: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key or not text:
            raise UsageError(f"--pass-config {pair}: write it like tirx.disable_vectorize=true")
        config[key] = _value(text)
    return config


def _value(text: str) -> Any:
    if text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class PassWatch:
    """The hooks of one compile as its command line asks for them.

    Modules are printed to standard output, or with --json to standard error. ``snapshots`` keeps the modules
    that came out of the ``wanted_snapshots``, by the name of the pass.
    """

    def __init__(self, arguments: argparse.Namespace, output: Output) -> None:
        from rotquant_tvm.pass_hooks import PassTimer

        self._before = set(arguments.print_ir_before)
        self._after = set(arguments.print_ir_after)
        self._disabled = tuple(arguments.disabled_pass)
        self._output = output
        self._seen: set[str] = set()
        self.timer: PassTimer | None = PassTimer() if arguments.print_pass_times else None
        self.snapshots: dict[str, tvm.IRModule] = {}
        self.wanted_snapshots: set[str] = set()

    @property
    def names(self) -> set[str]:
        """Every pass that the command line names."""
        return self._before | self._after | set(self._disabled)

    def hooks(self) -> PassHooks:
        """Return the hooks to compile with."""
        from rotquant_tvm.pass_hooks import PassHooks

        return PassHooks(self._on_enter, self._on_leave, self._disabled)

    def _on_enter(self, name: str, mod: tvm.IRModule) -> None:
        self._seen.add(name)
        if name in self._before:
            self._print(f"# before {name}", mod)
        if self.timer is not None:
            self.timer.before(name, mod)

    def _on_leave(self, name: str, mod: tvm.IRModule) -> None:
        if self.timer is not None:
            self.timer.after(name, mod)
        if name in self.wanted_snapshots:
            self.snapshots[name] = mod
        if name in self._after:
            self._print(f"# after {name}", mod)

    def _print(self, title: str, mod: tvm.IRModule) -> None:
        stream = self._output.streams.err if self._output.as_json else self._output.streams.out
        stream.write(f"{title}\n{mod.script(show_meta=False)}\n\n")

    def report_idle(self) -> None:
        """Note the passes that were named and did not run."""
        for name in sorted((self._before | self._after) - self._seen):
            self._output.note(f"pass {name} did not run in this compile")


def pass_times(timer: PassTimer) -> list[dict[str, Any]]:
    """Return the times as plain data; TVM's wrappers around sequences of passes are left out."""
    return [vars(entry) for entry in timer.times if entry.name not in ("sequential", "_pipeline")]


def pass_times_table(timer: PassTimer) -> Table:
    """Return the times as a table; passes that run inside others are indented."""
    rows = [
        ["  " * entry["depth"] + entry["name"], entry["runs"], f"{entry['seconds']:.3f}"] for entry in pass_times(timer)
    ]
    return table("pass times (a pass includes those inside it)", ["pass", "runs", "seconds"], rows)
