"""Options that several subcommands share, and the types of their values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from rotquant_tvm.cli.config_file import add_config_option
from rotquant_tvm.cli.unknown_words import unknown_choice
from rotquant_tvm.errors import UsageError
from rotquant_tvm.input_shapes import fixed_batch, parse_input_shapes
from rotquant_tvm.near_words import did_you_mean, near_words

if TYPE_CHECKING:
    from rotquant_tvm.kv_cache_config import KVCacheConfig

_POLICY_OPTIONS = ("sinks", "recent", "center", "defer")
"""Each is a flag --kv-NAME; ``cache_policy`` explains them, but needs NumPy."""
_LONGEST = 40
"""Of what an error shows of a number."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ``UsageError``s, so that they end like every other error."""

    def error(self, message: str) -> NoReturn:
        """Raise the usage error."""
        raise UsageError(f"{message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a command or another word that is none of those known, saying which was probably meant."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, unknown_choice(value, action.choices))


def common_options() -> Parser:
    """Return a parent parser with the options of every subcommand."""
    parent = Parser(add_help=False)
    group = parent.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON document on standard output")
    group.add_argument(
        "-v",
        "--verbose",
        dest="verbosity",
        action="count",
        default=0,
        help="say more on standard error; -vv: tracebacks, and what TVM and torch print",
    )
    group.add_argument(
        "-q", "--quiet", dest="verbosity", action="store_const", const=-1, help="nothing on standard error but errors"
    )
    add_config_option(group)
    return parent


def add_kv_options(parser: argparse.ArgumentParser, capacity: bool = True) -> None:
    """Add the options that say how the KV cache is stored, with or without the sessions' ``capacity``."""
    group = parser.add_argument_group("KV cache")
    group.add_argument(
        "--kv-cache",
        metavar="K[/V]",
        help="format of keys and values, or of both: rq3, iso3/planar3 (default: rq3; see tvmc formats); "
        "cache options may follow: 'rq3,sinks=4'",
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
        "--kv-on-unsupported",
        choices=("refuse", "keep"),
        default="refuse",
        help="what becomes of keys or values with heads that their format cannot take: refuse the model (the default), "
        "or keep them in 16 bits",
    )
    if capacity:
        group.add_argument(
            "--kv-capacity",
            metavar="N",
            type=tokens(1),
            default=4096,
            help="tokens per sequence of a session that names no capacity (default: 4096)",
        )
    _add_policy_options(parser)


def _add_policy_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "KV cache policy", "Presets (rq2, rq3, rq4) bring one; these replace parts of it."
    )
    group.add_argument(
        "--kv-sinks", metavar="N", type=tokens(0), help="the first N tokens of a sequence stay in 16 bits"
    )
    group.add_argument("--kv-recent", metavar="N", type=tokens(0), help="at least the newest N tokens are in 16 bits")
    center = group.add_mutually_exclusive_group()
    center.add_argument(
        "--kv-center",
        metavar="N",
        type=tokens(32),
        help="quantize K in blocks of N tokens less their mean; N is a multiple of 32",
    )
    center.add_argument(
        "--no-kv-center", dest="kv_center", action="store_const", const=0, help="quantize K without centring"
    )
    group.add_argument(
        "--kv-defer",
        metavar="N",
        type=tokens(0),
        help="N further 16-bit slots, filled by prefill before it quantizes; the first decode step empties them",
    )


def kv_cache_config(arguments: argparse.Namespace) -> KVCacheConfig:
    """Return the configuration that the options of ``add_kv_options`` ask for. Raises UsageError and FormatError."""
    from rotquant_tvm.kv_cache_config import KVCacheConfig

    config = KVCacheConfig.parse(kv_cache_text(arguments), arguments.kv_layers)
    return replace(config, on_unsupported=arguments.kv_on_unsupported)


def kv_cache_text(arguments: argparse.Namespace) -> str:
    """Return the text for ``KVCacheConfig.parse``: the formats, then the cache options given with them or as flags.

    Raises UsageError where two options say the same thing: --kv-cache and -ctk/-ctv, or --kv-sinks and ``sinks=``.
    """
    text = _formats_text(arguments)
    written = {word.partition("=")[0].strip() for word in text.split(",")[1:]}
    for name in _POLICY_OPTIONS:
        value = getattr(arguments, f"kv_{name}")
        if value is None:
            continue
        if name in written:
            flag = "--no-kv-center" if name == "center" and value == 0 else f"--kv-{name}"
            raise UsageError(f"{flag} and {name}= in '{text}' say the same thing; give one of them")
        text += f",{name}={value}"
    return text


def _formats_text(arguments: argparse.Namespace) -> str:
    k, v = arguments.cache_type_k, arguments.cache_type_v
    if k is None and v is None:
        return "rq3" if arguments.kv_cache is None else str(arguments.kv_cache)
    if arguments.kv_cache is not None:
        raise UsageError("--kv-cache and -ctk/-ctv say the same thing; give one of them")
    for option, value in (("-ctk", k), ("-ctv", v)):
        if "," in (value or ""):
            raise UsageError(f"{option} takes one format, not '{value}'; give cache options like --kv-sinks 4")
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


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the argument type of an integer of ``least`` or more, and of ``most`` or less."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:_LONGEST]!r} is not an integer") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; give {least} or more")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{text[:_LONGEST]} is too large; give {most} or less")
        return value

    return parse


def tokens(least: int) -> Callable[[str], int]:
    """Return the argument type of a number of tokens: ``least`` or more, and no more than a sequence can have."""

    def parse(text: str) -> int:
        from rotquant_tvm.cache_policy import MOST_TOKENS

        return integer(least, MOST_TOKENS)(text)

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
            near = did_you_mean(near_words(unknown[0], choices)) if unknown else ""
            raise argparse.ArgumentTypeError(f"unknown '{unknown[0]}'{near}{known}" if unknown else f"empty{known}")
        return list(dict.fromkeys(found))

    return parse
