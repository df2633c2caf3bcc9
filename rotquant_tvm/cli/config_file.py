"""``--config FILE``: options kept in a file, TOML or JSON, as if they stood before those of the command line.

A key is an option's long name without its dashes; a table named like a command holds options of that command alone::

    kv-cache = "rq3"                # for every command that has the option
    [compile]
    target = "nvidia/nvidia-h100"
    dump-code = ["ir", "cuda"]      # a list is joined by commas
    print-pass-times = true         # a flag

What stands on the command line comes later and so counts.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rotquant_tvm.cli.unknown_words import suggestion
from rotquant_tvm.errors import UsageError
from rotquant_tvm.near_words import did_you_mean, near_words

OPTION = "--config"
MAX_BYTES = 1 << 20


def add_config_option(parser: argparse._ActionsContainer) -> None:
    """Add ``--config``, for the help alone: ``expand_config`` has replaced it before anything is parsed."""
    parser.add_argument(OPTION, metavar="FILE", help="options from a TOML or JSON file; words given here overrule it")


def expand_config(argv: Sequence[str], commands: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """Replace every ``--config FILE`` of a command's words by the file's options, put right behind the command.

    Raises ``UsageError`` for a file that cannot be read, an unknown option or a value that no option can have.
    """
    name = next((word for word in argv if word in commands), None)
    if name is None or not any(_is_config(word) for word in argv):
        return list(argv)
    kept: list[str] = []
    given: list[str] = []
    words = iter(argv)
    for word in words:
        if not _is_config(word):
            kept.append(word)
            continue
        path = word.partition("=")[2] if "=" in word else next(words, "")
        if not path:
            raise UsageError(f"{OPTION} needs a file; see tvmc {name} --help")
        given += _options(Path(path), name, commands)
    at = kept.index(name) + 1
    return [*kept[:at], *given, *kept[at:]]


def _is_config(word: str) -> bool:
    return word == OPTION or word.startswith(f"{OPTION}=")


def _options(path: Path, name: str, commands: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """The words that a file adds to the command ``name``."""
    content = _read(path)
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    common = {key: value for key, value in content.items() if key not in tables}
    for key, table in tables.items():
        if key not in commands:
            meant = did_you_mean(near_words(key, commands))
            raise UsageError(f"{path}: there is no command {key!r}{meant}; known: {', '.join(commands)}")
        _check_known(path, table, {key: commands[key]})
    _check_known(path, common, commands)
    known = _long_options(commands[name])
    chosen = {key: value for key, value in common.items() if f"--{key}" in known} | tables.get(name, {})
    return [word for key, value in chosen.items() for word in _words(path, key, value, known[f"--{key}"])]


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than {MAX_BYTES} bytes: no file of options")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{OPTION}: {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{OPTION}: {path} is neither TOML nor JSON (by its ending): {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{OPTION}: {path} holds no table of options")
    return content


def _long_options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {
        word: action
        for word, action in parser._option_string_actions.items()
        if word.startswith("--") and word not in ("--help", OPTION)
    }


def _check_known(path: Path, options: Mapping[str, Any], commands: Mapping[str, argparse.ArgumentParser]) -> None:
    known = list(dict.fromkeys(name for parser in commands.values() for name in _long_options(parser)))
    for key in options:
        if f"--{key}" not in known:
            where = f"tvmc {next(iter(commands))}" if len(commands) == 1 else "any command of tvmc"
            meant = suggestion(f"--{key}", known).replace("--", "")
            raise UsageError(f"{path}: {key!r} is no option of {where}{meant}")


def _words(path: Path, key: str, value: Any, action: argparse.Action) -> list[str]:
    """An option as words of a command line."""
    if action.nargs == 0:  # a flag
        if not isinstance(value, bool):
            raise UsageError(f"{path}: {key} is a flag: true or false, not {value!r}")
        return [f"--{key}"] if value else []
    values = value if isinstance(value, list) else [value]
    if any(isinstance(part, bool) or not isinstance(part, str | int | float) for part in values):
        raise UsageError(f"{path}: {key} takes text or numbers, not {value!r}")
    return [f"--{key}={','.join(map(str, values))}"]
