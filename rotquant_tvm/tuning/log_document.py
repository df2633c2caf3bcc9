"""A log's files as data: read with bounds on size and depth, every entry checked, before anything is made of them.

Logs come from other machines. Nothing here runs code, and names that become paths are of one plain form.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20
"""No log file is larger; the largest of 1,000 records take a tenth."""

_TARGET = frozenset(
    "kind tag keys host mcpu mtriple mattr mfloat-abi mabi num-cores vector-width arch max_num_threads "
    "thread_warp_size max_threads_per_block max_shared_memory_per_block registers_per_block "
    "l2_cache_size_bytes".split()
)
_LONGEST_TEXT = 1000
_DEEPEST = 6
_DIGITS = 300
"""Of an integer that a float can hold."""
_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")


class MalformedLogError(ValueError):
    """What is wrong with a log's content."""


def parse_lines(text: str, name: str) -> list[Any]:
    """Parse one JSON document per line; raises as ``parse``."""
    return [parse(line, name) for line in text.split("\n") if line.strip()]


def read_text(path: Path) -> str:
    """Read a file. Raises OSError, or MalformedLogError for what is too large, no plain file or no text."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise MalformedLogError(f"{path.name} is no plain file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise MalformedLogError(f"{path.name} is larger than {MAX_BYTES} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedLogError(f"{path.name} is no text: {error}") from error


def parse(text: str, name: str) -> Any:
    """Parse one JSON document. Raises MalformedLogError for one that is nested too deeply, or none.

    NaN and infinities are not JSON, nor are numbers that no float can hold, integers among them, nor characters that a
    terminal would obey.
    """
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_integral, strict=True)
    except RecursionError as error:
        raise MalformedLogError(f"{name} is nested too deeply") from error
    except ValueError as error:
        raise MalformedLogError(f"{name} is not JSON: {error}") from error


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is out of range")
    return value


def _integral(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"{text[:20]}… is out of range")
    return int(text)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _not_negative(value: Any) -> bool:
    return _number(value) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _count(value: Any) -> bool:
    return _integer(value) and value >= 0


def _texts(value: Any) -> bool:
    """Text of one line, without what a terminal would obey."""
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT and value.isprintable()


def _integers(value: Any) -> bool:
    return isinstance(value, dict) and all(_texts(name) and _integer(part) for name, part in value.items())


def _sizes(value: Any) -> bool:
    return _integers(value) and all(size > 0 for size in value.values())


def _object(value: Any) -> bool:
    """An object of texts, numbers, and lists and objects of these."""
    return isinstance(value, dict) and _plain(value, _DEEPEST)


def _plain(value: Any, depth: int) -> bool:
    if isinstance(value, dict | list):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(_plain(part, depth - 1) for part in parts)
    if isinstance(value, str):
        return _texts(value)
    return value is None or isinstance(value, bool | float) or _integer(value)


def _target(value: Any) -> bool:
    """A target by attributes that say what a device is; others could make compilers do things."""
    return _object(value) and set(value) <= _TARGET and (value.get("host") is None or _target(value["host"]))


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


_RECORD: Mapping[str, Callable[[Any], bool]] = {
    "operator": _texts,
    "properties": _object,
    "bucket": _sizes,
    "rule": _texts,
    "kernel_hash": _texts,
    "knobs": _integers,
    "seconds": _positive,
    "rule_seconds": _or_none(_positive),
    "nbytes": _count,
    "share": _or_none(_not_negative),
    "trials": _count,
    "date": _texts,
}
_RECORD_OPTIONAL: Mapping[str, Callable[[Any], bool]] = {"flops": _count}
_LOG_OPTIONAL: Mapping[str, Callable[[Any], bool]] = {"product_rate": _or_none(_positive)}
"""What logs of earlier versions do not have."""
_DEVICE: Mapping[str, Callable[[Any], bool]] = {
    "slug": lambda value: isinstance(value, str) and _SLUG.fullmatch(value) is not None,
    "name": _texts,
    "kind": lambda value: value in ("llvm", "cuda"),
    "arch": _texts,
    "attributes": lambda value: _object(value) and _sizes({"threads": value.get("threads", 1)}),
}
_LOG: Mapping[str, Callable[[Any], bool]] = {
    "device": lambda value: isinstance(value, dict),
    "target": _target,
    "tvm": _texts,
    "layout_version": _count,
    "copy_bandwidth": _or_none(_positive),
    "records": lambda value: isinstance(value, list) and all(isinstance(part, dict) for part in value),
}


def check_manifest(document: Any) -> None:
    """Check a manifest's entries and those of its device and records. Raises MalformedLogError naming the first."""
    if not isinstance(document, dict):
        raise MalformedLogError("the manifest is no JSON object")
    _check(document, _LOG, "the manifest")
    _check(document, _given(_LOG_OPTIONAL, document), "the manifest")
    _check(document["device"], _DEVICE, "its device")
    _check(document, {"device": _object}, "the manifest")
    for number, record in enumerate(document["records"]):
        _check(record, dict(_RECORD) | _given(_RECORD_OPTIONAL, record), f"record {number}")
        if unknown := sorted(set(record) - set(_RECORD) - set(_RECORD_OPTIONAL)):
            raise MalformedLogError(f"record {number} has an unknown entry {unknown[0]!r}")


def _given(checks: Mapping[str, Callable[[Any], bool]], document: Mapping[str, Any]) -> dict[str, Any]:
    return {name: check for name, check in checks.items() if name in document}


def _check(document: Mapping[str, Any], checks: Mapping[str, Callable[[Any], bool]], where: str) -> None:
    for name, check in checks.items():
        if name not in document:
            raise MalformedLogError(f"{where} has no entry {name!r}")
        if not check(document[name]):
            shown = repr(document[name])
            raise MalformedLogError(f"{name!r} of {where} is {shown[:60]}{'…' if len(shown) > 60 else ''}")
