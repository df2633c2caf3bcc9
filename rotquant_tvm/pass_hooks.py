"""What a compile does around its passes: print, time or skip them, those inside TVM included."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm.ir.instrument import PassInstrument, pass_instrument

Hook = Callable[[str, tvm.IRModule], None]


@dataclass(frozen=True)
class PassHooks:
    """Called with a pass's name and the module ``before`` and ``after`` every pass; passes may nest.

    ``disabled``: names of passes to leave out.
    """

    before: Hook | None = None
    after: Hook | None = None
    disabled: Sequence[str] = field(default_factory=tuple)

    def timed(self, timer: PassTimer) -> PassHooks:
        """Return these hooks with a timer that does not count what they take themselves."""

        def before(name: str, mod: tvm.IRModule) -> None:
            if self.before is not None:
                self.before(name, mod)
            timer.before(name, mod)

        def after(name: str, mod: tvm.IRModule) -> None:
            timer.after(name, mod)
            if self.after is not None:
                self.after(name, mod)

        return PassHooks(before, after, self.disabled)

    def instruments(self) -> list[PassInstrument]:
        """Return what a ``tvm.transform.PassContext`` takes to call these hooks."""
        if self.before is None and self.after is None and not self.disabled:
            return []
        return [_HookInstrument(self)]


@pass_instrument
class _HookInstrument:
    def __init__(self, hooks: PassHooks) -> None:
        self.hooks = hooks

    def should_run(self, _mod: tvm.IRModule, info: Any) -> bool:
        return info.name not in self.hooks.disabled

    def run_before_pass(self, mod: tvm.IRModule, info: Any) -> None:
        if self.hooks.before is not None:
            self.hooks.before(str(info.name), mod)

    def run_after_pass(self, mod: tvm.IRModule, info: Any) -> None:
        if self.hooks.after is not None:
            self.hooks.after(str(info.name), mod)


@dataclass(frozen=True)
class PassTime:
    """How long one pass took over all its runs, in seconds, the passes inside it included.

    ``depth`` 0 is the pipeline's own level.
    """

    name: str
    runs: int
    seconds: float
    depth: int


class PassTimer:
    """Times passes by its methods ``before`` and ``after``, which fit ``PassHooks``."""

    def __init__(self) -> None:
        self._open: list[tuple[str, float]] = []
        self._times: dict[str, PassTime] = {}

    def before(self, name: str, _mod: tvm.IRModule) -> None:
        """Note that a pass begins."""
        depth = len(self._open)
        self._times.setdefault(name, PassTime(name, 0, 0.0, depth))
        self._open.append((name, time.perf_counter()))

    def after(self, name: str, _mod: tvm.IRModule) -> None:
        """Note that the pass that began last has ended."""
        _, since = self._open.pop()
        past = self._times[name]
        depth = min(past.depth, len(self._open))
        taken = past.seconds + time.perf_counter() - since
        self._times[name] = PassTime(name, past.runs + 1, taken, depth)

    def seconds(self, names: Iterable[str]) -> dict[str, float]:
        """Return the seconds of those of ``names`` that have run, in the order of ``names``."""
        return {name: self._times[name].seconds for name in names if name in self._times}

    @property
    def times(self) -> list[PassTime]:
        """Every pass in the order in which they first began."""
        return list(self._times.values())
