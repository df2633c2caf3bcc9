"""Words of a command line that its grammar has no place for: which options were probably meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

from rotquant_tvm.errors import UsageError


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """The long options of a command and of its own subcommands, each once."""
    names = dict.fromkeys(name for name in parser._option_string_actions if name.startswith("--"))
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                names |= dict.fromkeys(option_names(inner))
    return list(names)


def unknown_words(command: str, words: Sequence[str], known: Sequence[str]) -> UsageError:
    """The error for what is left of a command line; ``known``: the command's long options."""
    see = f"see tvmc {command} --help"
    option = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if option is None:
        return UsageError(f"one argument too many: {words[0]}; {see}")
    return UsageError(f"tvmc {command} has no option {option}{suggestion(option, known)}; {see}")


def suggestion(option: str, known: Sequence[str]) -> str:
    """``"; did you mean …"``, with options that are spelled alike or that end in the words of this one, or nothing."""
    ending = [name for name in known if option.strip("-") and name.endswith(f"-{option.lstrip('-')}")]
    close = difflib.get_close_matches(option, known, n=3, cutoff=0.75) if option.startswith("--") else []
    near = list(dict.fromkeys([*ending, *close]))[:3]
    return f"; did you mean {' or '.join(near)}" if near else ""
