"""What can be done next, said on standard error behind what a command has shown."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Document = Mapping[str, Any]
PROMPT = "Once upon a time"


def next_steps(arguments: argparse.Namespace, document: Document) -> list[str]:
    """Return lines like ``tvmc run model.rq …   (text from it)``, by what a command was asked and what came of it."""
    step = _STEPS.get(arguments.command)
    return step(arguments, document) if step is not None else []


def _line(words: list[object], what: str) -> str:
    return f"{shlex.join(['tvmc', *map(str, words)])}   ({what})"


def _cache_words(arguments: argparse.Namespace) -> list[object]:
    """The options that said how the cache is stored, to be said again."""
    words: list[object] = []
    for option in ("kv_cache", "kv_layers", "kv_sinks", "kv_recent", "kv_center", "kv_defer"):
        value = getattr(arguments, option, None)
        if option == "kv_center" and value == 0:
            words.append("--no-kv-center")
        elif isinstance(value, str | int):
            words += [f"--{option.replace('_', '-')}={value}"] if str(value)[:1] == "-" else [_flag(option), value]
    for short, value in (("-ctk", arguments.cache_type_k), ("-ctv", arguments.cache_type_v)):
        words += [] if value is None else [short, value]
    return words


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _target_words(arguments: argparse.Namespace) -> list[object]:
    words: list[object] = [] if arguments.target == "llvm" else ["--target", arguments.target]
    return words + (["--dtype", arguments.dtype] if arguments.dtype not in (None, "float32") else [])


def _compile(arguments: argparse.Namespace, document: Document) -> list[str]:
    artifact = _shown(document["artifact"])
    lines = [_line(*_first_run(artifact, document))]
    if not document["report"].get("tuning_records"):
        words = ["tune", arguments.model, *_cache_words(arguments), *_target_words(arguments)]
        lines.append(_line(words, "faster kernels for this device; then compile again"))
    return lines


def _first_run(artifact: object, document: Document) -> tuple[list[object], str]:
    """What to run an artifact with: text needs a tokenizer."""
    if document.get("tokenizer", True):
        return ["run", artifact, "--prompt", PROMPT], "text from it"
    return ["run", artifact, "--print-time"], "a prefill of random ids: it has no tokenizer for text"


def _tune(arguments: argparse.Namespace, document: Document) -> list[str]:
    if "tasks" in document:
        model = [] if arguments.model is None else [arguments.model]
        words: list[object] = ["tune", *model, *_target_words(arguments), *_cache_words(arguments), "--tasks", "0"]
        return [_line(words, "tune one of them; without --tasks all")]
    if not document.get("records"):
        return []
    records: list[object] = [] if arguments.output is None else ["--tuning-records", arguments.output]
    words = ["compile", arguments.model or "model.gguf", *_cache_words(arguments), *_target_words(arguments), *records]
    found = "" if records else "; it finds the log by itself"
    return [_line(words, f"a library with these kernels{found}"), _line(["logs", "list", *records[1:]], "the log")]


def _run(arguments: argparse.Namespace, document: Document) -> list[str]:
    if document.get("mode") != "generate" or arguments.print_time:
        return []
    prompt = arguments.prompt if len(arguments.prompt) < 40 else PROMPT
    return [_line(["run", arguments.artifact, "--prompt", prompt, "--print-time"], "how fast it is")]


def _inspect(arguments: argparse.Namespace, document: Document) -> list[str]:
    if "artifact" in document:
        return [_line(*_first_run(arguments.model, document))]
    return [_line(["compile", arguments.model, *_cache_words(arguments)], "a library with this cache")]


def _formats(_arguments: argparse.Namespace, _document: Document) -> list[str]:
    return [_line(["compile", "model.gguf", "--kv-cache", "rq3"], "a library whose cache has such a format")]


def _env(_arguments: argparse.Namespace, _document: Document) -> list[str]:
    return [_line(["compile", "model.gguf", "--kv-cache", "rq3", "-o", "model.rq"], "a library of a model")]


def _eval(arguments: argparse.Namespace, _document: Document) -> list[str]:
    chosen = (arguments.kv_cache or ["rq3"])[0]
    return [_line(["compile", arguments.model, "--kv-cache", chosen], "a library with this cache")]


def _bench(arguments: argparse.Namespace, _document: Document) -> list[str]:
    target = [] if arguments.target == "llvm" else ["--target", arguments.target]
    return [_line(["tune", *target], "faster kernels for this device")]


def _logs(arguments: argparse.Namespace, document: Document) -> list[str]:
    if arguments.action == "merge":
        return [_line(["compile", "model.gguf", "--tuning-records", arguments.output], "a library with these kernels")]
    if arguments.action == "list" and document.get("logs"):
        return [_line(["logs", "check", *arguments.paths], "whether they are whole and of today's kernels")]
    return []


def _shown(path: str) -> str:
    """A path as one would type it here."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


_STEPS: dict[str, Callable[[argparse.Namespace, Document], list[str]]] = {
    "compile": _compile,
    "tune": _tune,
    "run": _run,
    "inspect": _inspect,
    "formats": _formats,
    "env": _env,
    "eval": _eval,
    "bench": _bench,
    "logs": _logs,
}
