"""Run the kernels under compute-sanitizer: ``python -m tests.sanitizer.run_sanitizer DIR [TOOL …]``.

``DIR`` is what ``build_kernels`` wrote. Prints what each tool (memcheck, racecheck and initcheck) found, by family.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

TOOLS = {
    "memcheck": ("--padding", "32", "--destroy-on-device-error", "kernel"),
    "racecheck": ("--racecheck-report", "analysis"),
    "initcheck": (),
}
PLAN = "cases.json"
LAUNCHED = re.compile(r"^launched (\w+)", re.M)
LAUNCHER = Path(__file__).with_name("launch_kernels.py")
_REPORT = re.compile(r"^=+\s+(?:Error: |Warning: )?(?P<what>\S.*)$")
_KINDS = (
    *("Invalid ", "Misaligned", "Race reported", "Potential", "Uninitialized", "Out-of-range"),
    *("Barrier", "Host API", "Program hit", "Internal"),
)
"""How the first lines of reports begin."""


def command(tool: str, folder: Path, words: Sequence[str] = ()) -> list[str]:
    """The command line that runs every case under a tool."""
    options = ["--tool", tool, "--print-limit", "400", "--error-exitcode", "9", *TOOLS[tool]]
    return ["compute-sanitizer", *options, sys.executable, str(LAUNCHER), str(folder), *words]


def findings(text: str, families: dict[str, str]) -> tuple[Counter[str], dict[str, str]]:
    """What a sanitizer reported, by family ("elsewhere" where no kernel is named), and the first report of each.

    ``families`` maps a kernel's symbol to its family.
    """
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    for report in _reports(text):
        named = next((s for s in sorted(families, key=len, reverse=True) if f"{s}_kernel" in report), None)
        family = families[named] if named else "elsewhere"
        found[family] += 1
        first.setdefault(family, f"{named or ''}: {' | '.join(report.splitlines()[:4])[:300]}")
    return found, first


def _reports(text: str) -> list[str]:
    """The reports of a sanitizer's output, each of several lines."""
    reports: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        match = _REPORT.match(line)
        if match and match["what"].startswith(_KINDS):
            reports.append([match["what"]])
            inside = True
        elif match and inside:
            reports[-1].append(match["what"])
        else:
            inside = False
    return ["\n".join(report) for report in reports]


def run(tool: str, folder: Path, words: Sequence[str] = (), shares: int = 1, timeout: float = 600) -> tuple[bool, str]:
    """Run a tool over the cases, in ``shares`` processes side by side; their logs stay in ``folder``.

    Returns whether it is clean and complete, and a summary of a line per family.
    """
    plan = json.loads((folder / PLAN).read_text())
    plan = {name: entry for name, entry in plan.items() if not words or entry["family"] in words or name in words}
    logs = [folder / f"{tool}.{share}.log" for share in range(shares)]
    started = [
        subprocess.Popen(
            command(tool, folder, [*words, f"--share={share}/{shares}"]), stdout=log.open("w"), stderr=subprocess.STDOUT
        )
        for share, log in enumerate(logs)
    ]
    end, status = time.monotonic() + timeout, []
    for process in started:
        try:
            status.append(str(process.wait(max(0.1, end - time.monotonic()))))
        except subprocess.TimeoutExpired:
            process.terminate()
            status.append("out of time")
    texts = [log.read_text(errors="replace") for log in logs]
    launched = Counter(plan[name]["family"] for text in texts for name in LAUNCHED.findall(text) if name in plan)
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    for text in texts:
        counted, shown = findings(text, {name: entry["family"] for name, entry in plan.items()})
        found, first = found + counted, shown | first
    wanted = Counter(entry["family"] for entry in plan.values())
    lines = [f"{tool} {name:16s} {launched[name]}/{wanted[name]} launched, {found[name]} reports" for name in wanted]
    lines += [f"{tool} first in {family}: {report}" for family, report in first.items()]
    lines += [f"{tool} status {code}; {_last_words(text)}" for code, text in zip(status, texts, strict=True)]
    return set(status) == {"0"} and not found and launched == wanted, "\n".join(lines)


def _last_words(text: str) -> str:
    """The tool's own summary; what was said last if there is none."""
    summaries = [line for line in text.splitlines() if "SUMMARY" in line]
    return summaries[-1].strip("= ") if summaries else text[-300:]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if every tool is clean."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tools", nargs="*", default=[*TOOLS])
    parser.add_argument("--shares", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a tool")
    chosen = parser.parse_args(argv)
    results = []
    for tool in chosen.tools:
        clean, summary = run(tool, chosen.folder, (), chosen.shares, chosen.timeout)
        print(summary, flush=True)
        results.append(clean)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
