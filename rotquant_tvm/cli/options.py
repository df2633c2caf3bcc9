"""Options that several subcommands share, and the types of their values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from rotquant_tvm.errors import UsageError
from rotquant_tvm.input_shapes import fixed_batch, parse_input_shapes


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ``UsageError``s, so that they end like every other error."""

    def error(self, message: str) -> NoReturn:
        """Raise the usage error."""
        raise UsageError(f"{message}; see {self.prog} --help")


def common_options() -> Parser:
    """Return a parent parser with the options of every subcommand."""
    parent = Parser(add_help=False)
    group = parent.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON document on standard output")
    group.add_argument(
        "-v",
        dest="verbosity",
        action="count",
        default=0,
        help="say more on standard error; -vv: tracebacks, and what TVM and torch print",
    )
    return parent


def add_kv_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how the KV cache is stored."""
    group = parser.add_argument_group("KV cache")
    group.add_argument(
        "--kv-cache",
        metavar="K[/V]",
        help="format of keys and values, or of both: rq3, iso3/planar3 (default: rq3; see tvmc formats)",
    )
    group.add_argument(
        "-ctk",
        "--cache-type-k",
        metavar="K",
        help="format of the keys, as llama.cpp spells the option; values stay f16 without -ctv",
    )
    group.add_argument("-ctv", "--cache-type-v", metavar="V", help="format of the values; keys stay f16 without -ctk")
    group.add_argument("--kv-layers", metavar="LIST", help="formats of single layers: '0,-1=f16;5=iso4' (-1: the last)")
    group.add_argument(
        "--kv-capacity",
        metavar="N",
        type=integer(1),
        default=4096,
        help="tokens per sequence of a session that names no capacity (default: 4096)",
    )


def kv_cache_text(arguments: argparse.Namespace) -> str:
    """Return the ``K/V`` spelling that --kv-cache or -ctk/-ctv ask for; raises UsageError for both."""
    k, v = arguments.cache_type_k, arguments.cache_type_v
    if k is None and v is None:
        return "rq3" if arguments.kv_cache is None else str(arguments.kv_cache)
    if arguments.kv_cache is not None:
        raise UsageError("--kv-cache and -ctk/-ctv say the same thing; give one of them")
    return f"{k or 'f16'}/{v or 'f16'}"


def join_layer_lists(argv: Sequence[str]) -> list[str]:
    """Make ``--kv-layers -1=f16`` one word, which argparse would else take for an option called -1."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1] == "--kv-layers" and re.match(r"-\d", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def input_shapes(text: str) -> dict[str, list[int]]:
    """Return the value of --input-shapes, checked."""
    try:
        shapes = parse_input_shapes(text)
        fixed_batch(shapes)
    except UsageError as error:  # argparse would hide its text: it is a ValueError
        raise argparse.ArgumentTypeError(str(error)) from error
    return shapes


def integer(least: int) -> Callable[[str], int]:
    """Return the argument type of an integer of ``least`` or more."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not an integer") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; give {least} or more")
        return value

    return parse


def number(least: float, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Return the argument type of a finite number from ``least`` (or ``above`` it) to ``most``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
        if not (least < value if above else least <= value) or not value <= most or math.isinf(value):
            bounds = f"{'above' if above else 'from'} {least:g}" + (f" to {most:g}" if most < math.inf else " on")
            raise argparse.ArgumentTypeError(f"{text} is outside; give a number {bounds}")
        return value

    return parse


def words(*choices: str) -> Callable[[str], list[str]]:
    """Return the argument type of a comma-separated list of words, out of ``choices`` if there are any."""

    def parse(text: str) -> list[str]:
        found = [word.strip() for word in text.split(",") if word.strip()]
        unknown = [word for word in found if choices and word not in choices]
        if unknown or not found:
            known = f"; known: {', '.join(choices)}" if choices else ""
            raise argparse.ArgumentTypeError(f"unknown '{unknown[0]}'{known}" if unknown else f"empty{known}")
        return list(dict.fromkeys(found))

    return parse
