"""Live progress of ``tvmc tune`` on standard error: a bar on a terminal, one line per batch of trials elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rotquant_tvm.cli.output import Output

if TYPE_CHECKING:
    from rotquant_tvm.tuning.progress import Progress as Told
    from rotquant_tvm.tuning.progress import Step


@contextmanager
def tuning_progress(output: Output, first: str) -> Iterator[Told]:
    """Show what a tuning run tells until the block ends; ``first`` stands there until it has told anything."""
    console = Console(file=output.streams.err, highlight=False, emoji=False)
    if not console.is_terminal:
        output.note(f"{first} …")
        yield lambda step: output.note(f"{described(step)} ({step.done} of {step.total} in {_duration(step.seconds)})")
        return
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn()]
    options: dict[str, Any] = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
    with Progress(*columns, TimeElapsedColumn(), console=console, **options) as bar:
        task = bar.add_task(first, total=None)
        yield lambda step: bar.update(
            task, description=escape(described(step)), total=step.total, completed=step.done, refresh=True
        )


def described(step: Step) -> str:
    """Task, trials, best time, its gain and share of the roofline, and time left, in a line."""
    words = [f"task {step.number} of {step.tasks}, {step.task}: {step.trials} of {step.most} trials"]
    if step.best is not None:
        gain = "" if step.rule is None else f" ({step.rule / step.best:.2f}× the rule's own)"
        words.append(f"best {1e6 * step.best:.4g} µs{gain}")
    if step.share is not None:
        words.append(f"{100 * step.share:.0f} % of the roofline")
    if step.left is not None:
        words.append(f"about {_duration(step.left)} left")
    return ", ".join(words)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
