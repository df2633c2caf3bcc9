"""A log's files as data: read with bounds on size and depth, every entry checked, before anything is made of them.

Logs come from other machines. Nothing here runs code, and names that become paths are of one plain form.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20
"""No log file is larger; the largest of 1,000 records take a tenth."""

_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")


class MalformedLogError(ValueError):
    """What is wrong with a log's content."""


def read_json(path: Path) -> Any:
    """Parse one JSON document. Raises OSError, or MalformedLogError for one too large or deep, or none."""
    return _parse(_text(path), path.name)


def read_json_lines(path: Path) -> list[Any]:
    """Parse one JSON document per line; raises as ``read_json``."""
    return [_parse(line, path.name) for line in _text(path).splitlines() if line.strip()]


def _text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise MalformedLogError(f"{path.name} is larger than {MAX_BYTES} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedLogError(f"{path.name} is no text: {error}") from error


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise MalformedLogError(f"{name} is nested too deeply") from error
    except ValueError as error:
        raise MalformedLogError(f"{name} is not JSON: {error}") from error


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _texts(value: Any) -> bool:
    return isinstance(value, str)


def _integers(value: Any) -> bool:
    return isinstance(value, dict) and all(_integer(part) for part in value.values())


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


_RECORD: Mapping[str, Callable[[Any], bool]] = {
    "operator": _texts,
    "properties": _object,
    "bucket": _integers,
    "rule": _texts,
    "kernel_hash": _texts,
    "knobs": _integers,
    "seconds": _positive,
    "rule_seconds": _or_none(_positive),
    "nbytes": _integer,
    "share": _or_none(_number),
    "trials": _integer,
    "date": _texts,
}
_DEVICE: Mapping[str, Callable[[Any], bool]] = {
    "slug": lambda value: isinstance(value, str) and _SLUG.fullmatch(value) is not None,
    "name": _texts,
    "kind": lambda value: value in ("llvm", "cuda"),
    "arch": _texts,
    "attributes": _object,
}
_LOG: Mapping[str, Callable[[Any], bool]] = {
    "device": _object,
    "target": _object,
    "tvm": _texts,
    "layout_version": _integer,
    "copy_bandwidth": _or_none(_positive),
    "records": lambda value: isinstance(value, list) and all(isinstance(part, dict) for part in value),
}


def check_manifest(document: Any) -> None:
    """Check a manifest's entries and those of its device and records. Raises MalformedLogError naming the first."""
    if not isinstance(document, dict):
        raise MalformedLogError("the manifest is no JSON object")
    _check(document, _LOG, "the manifest")
    _check(document["device"], _DEVICE, "its device")
    for number, record in enumerate(document["records"]):
        _check(record, _RECORD, f"record {number}")
        if unknown := sorted(set(record) - set(_RECORD)):
            raise MalformedLogError(f"record {number} has an unknown entry {unknown[0]!r}")


def _check(document: Mapping[str, Any], checks: Mapping[str, Callable[[Any], bool]], where: str) -> None:
    for name, check in checks.items():
        if name not in document:
            raise MalformedLogError(f"{where} has no entry {name!r}")
        if not check(document[name]):
            shown = repr(document[name])
            raise MalformedLogError(f"{name!r} of {where} is {shown[:60]}{'…' if len(shown) > 60 else ''}")
