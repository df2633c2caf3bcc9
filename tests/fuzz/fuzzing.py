"""How the fuzz tests try inputs: so many in an ordinary run, many more with ``-m full``; every input is counted.

``FUZZ_EXAMPLES`` in the environment replaces the number of the long form, and ``FUZZ_SHRINK=0`` shows a fault as it was
found, since smaller forms of a slow one take long to find. The counts are printed at a run's end.
"""

from __future__ import annotations

import os
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

INPUTS: Counter[str] = Counter()
"""Inputs tried, by what was fed with them."""

MEGABYTES, SECONDS = 256, 20
"""What one input may cost at most: growth of the process, and processor time (far above what any needs)."""

PHASES = (Phase.explicit, Phase.generate, Phase.target, Phase.shrink)
Check = Callable[[Any], None]


def forms(ordinary: int, full: int) -> pytest.MarkDecorator:
    """Run a test with ``examples`` in an ordinary number, and in a large one with ``-m full``."""
    full = int(os.environ.get("FUZZ_EXAMPLES", full))
    return pytest.mark.parametrize("examples", [ordinary, pytest.param(full, marks=pytest.mark.full)])


def fuzz(name: str, strategy: st.SearchStrategy[Any], check: Check, examples: int) -> None:
    """Try ``check`` on so many inputs; it raises for a fault. Short runs try the same inputs each time."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 1000,
        phases=PHASES if os.environ.get("FUZZ_SHRINK") != "0" else PHASES[:-1],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def attempt(value: Any) -> None:
        INPUTS[name] += 1
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        check(value)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown < MEGABYTES, f"{grown:.0f} MB for one input"
        assert time.process_time() - began < SECONDS, "one input takes very long"

    attempt()


@st.composite
def mutated(draw: st.DrawFn, valid: st.SearchStrategy[bytes], pieces: tuple[bytes, ...] = ()) -> bytes:
    """Valid bytes with a few changes: other bytes, a cut, a repetition, a foreign piece, another beginning."""
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 40))
        kind = draw(st.sampled_from(("flip", "set", "insert", "delete", "cut", "repeat", "piece", "head")))
        place = 0 if kind == "piece" and draw(st.booleans()) else place
        if kind == "flip" and place < len(data):
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            data[place : place + length] = draw(st.sampled_from((b"\0", b"\xff", b"9", b"\x7f"))) * length
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=20))
        elif kind == "delete":
            del data[place : place + length]
        elif kind == "cut":
            del data[place:]
        elif kind == "repeat":
            data[place:place] = data[place : place + length] * draw(st.integers(1, 50))
        elif kind == "piece" and pieces:
            data[place : place + length] = draw(st.sampled_from(pieces))
        elif kind == "head":
            data[:8] = draw(st.binary(min_size=8, max_size=8))
    return bytes(data)


JSON_PIECES = (
    *(b"null", b"true", b"-1", b"0", b"1e999", b"-1e999", b"NaN", b"1" * 30, b"9" * 5000, b"1.5", b'""', b"{}", b"[]"),
    *(b'"\\ud800"', b'"' + b"x" * 300 + b'"', b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"18446744073709551616", b","),
)
"""What JSON readers stumble over."""

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(("", "f16", "cuda", "llvm", "1", "\ud800", "../x", "\0")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
"""Any JSON value."""


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document of which some parts, at any depth, are gone or something else."""
    for _ in range(draw(st.integers(1, 3))):
        document = _changed_once(draw, document)
    return document


def _changed_once(draw: st.DrawFn, document: Any) -> Any:
    if isinstance(document, dict) and document and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(document, key=str)))
        action = draw(st.sampled_from(("inside", "inside", "inside", "remove", "rename")))
        rest = {name: value for name, value in document.items() if name != key}
        if action == "remove":
            return rest
        if action == "rename":
            return rest | {draw(st.text(max_size=8)): document[key]}
        return {**document, key: _changed_once(draw, document[key])}
    if isinstance(document, list) and document and draw(st.integers(0, 5)):
        at = draw(st.integers(0, len(document) - 1))
        if draw(st.booleans()):
            return [*document[:at], _changed_once(draw, document[at]), *document[at + 1 :]]
        return document[:at] + document[at + 1 :] if draw(st.booleans()) else [*document, document[at]]
    if isinstance(document, int | float) and draw(st.booleans()):
        return draw(
            st.sampled_from((0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, float("inf"), float("nan"), True))
        )
    return draw(PLAIN)
