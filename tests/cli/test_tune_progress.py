"""What ``tvmc tune`` shows while it works: lines in files, a bar on terminals."""

from __future__ import annotations

import io

import pytest

from rotquant_tvm.cli.output import Output
from rotquant_tvm.cli.streams import Streams
from rotquant_tvm.cli.tune_progress import described, tuning_progress
from rotquant_tvm.tuning.progress import Step

STEP = Step("append [b]x 1x1", 2, 5, 3, 16, 2e-6, 3e-6, 0.5, 19, 80, 61.0, 3700.0)
TOLD = "task 2 of 5, append [b]x 1x1: 3 of 16 trials, best 2 µs (1.50× the rule's own), 50 % of the roofline, about "


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream, *steps):
    output = Output(Streams(io.StringIO(), stream), as_json=False, verbosity=0)
    with tuning_progress(output, "start") as tell:
        for step in steps:
            tell(step)
    return stream.getvalue()


def test_a_line_per_batch():
    assert shown(io.StringIO(), STEP) == f"start …\n{TOLD}1 h 01 min left (19 of 80 in 1 min 01 s)\n"


def test_before_anything_is_known():
    empty = Step("append", 1, 1, 0, 16, None, None, None, 0, 16, 0.0, None)
    assert described(empty) == "task 1 of 1, append: 0 of 16 trials"


@pytest.mark.parametrize("steps", [(), (STEP,)])
def test_a_bar_on_a_terminal(steps, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")
    text = shown(Terminal(), *steps)
    assert ("19/80" in text and TOLD in text) if steps else "start" in text
    assert "\x1b[?25h" in text  # the cursor is there again
