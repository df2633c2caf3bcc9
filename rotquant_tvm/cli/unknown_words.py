"""Words of a command line that its grammar has no place for: which were probably meant."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from rotquant_tvm.errors import UsageError
from rotquant_tvm.near_words import did_you_mean, near_words

_ALIKE = 0.75
"""How much options must be alike: they share their dashes and first words."""


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


def unknown_choice(value: object, choices: Iterable[object]) -> str:
    """What an error says of a value that is none of an argument's ``choices``."""
    known = [str(choice) for choice in choices]
    near = did_you_mean(near_words(str(value), known))
    return f"invalid choice: {str(value)!r}{near} (choose from {', '.join(known)})"


def suggestion(option: str, known: Sequence[str]) -> str:
    """``"; did you mean …"``, with options that are spelled alike or that end in the words of this one, or nothing."""
    ending = [name for name in known if option.strip("-") and name.endswith(f"-{option.lstrip('-')}")]
    close = near_words(option, known, _ALIKE) if option.startswith("--") else []
    return did_you_mean(list(dict.fromkeys([*ending, *close]))[:3])
