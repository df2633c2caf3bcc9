"""Options and words that a command does not know."""

from __future__ import annotations

import pytest

from rotquant_tvm.cli.main import COMMANDS, build_parser
from rotquant_tvm.cli.unknown_words import option_names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("compile", "m", "--capacity", "4096"), "no option --capacity; did you mean --kv-capacity; see tvmc compile"),
        (("compile", "m", "--kv-cash=rq3"), "no option --kv-cash; did you mean --kv-cache; see tvmc compile --help"),
        (("compile", "m", "--sinks", "4"), "no option --sinks; did you mean --kv-sinks; "),
        (("run", "m", "--frobnicate"), "tvmc run has no option --frobnicate; see tvmc run --help"),
        (("formats", "rq3", "-z"), "tvmc formats has no option -z; see tvmc formats --help"),
        (("env", "more"), "one argument too many: more; see tvmc env --help"),
        (("compile", "m", "n"), "one argument too many: n; see tvmc compile --help"),
        (("logs", "list", "--jsn"), "tvmc logs has no option --jsn; did you mean --json; see tvmc logs --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_was_probably_meant(tvmc, words, said):
    ended = tvmc(*words)
    assert ended.status == 2 and ended.out == "" and ended.err.count("\n") == 1
    assert said in ended.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("compil", "m"), "argument COMMAND: invalid choice: 'compil'; did you mean compile or completion (choose"),
        (("tnue",), "'tnue'; did you mean tune (choose from compile, tune, "),
        (("frobnicate",), "invalid choice: 'frobnicate' (choose from compile, tune, "),
        (("logs", "mrege"), "argument action: invalid choice: 'mrege'; did you mean merge (choose from list, "),
        (("compile", "m", "--dtype", "flaot16"), "argument --dtype: invalid choice: 'flaot16'; did you mean float16 "),
        (("compile", "m", "-O", "7"), "argument -O/--opt-level: invalid choice: '7' (choose from 0, 1, 2, 3)"),
        (("compile", "m", "--dump-code", "ir,cud"), "argument --dump-code: unknown 'cud'; did you mean cuda; known: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_which_choice_was_probably_meant(tvmc, words, said):
    ended = tvmc(*words)
    assert ended.status == 2 and ended.out == "" and ended.err.count("\n") == 1
    assert said in ended.err


def test_every_command_has_options_that_can_be_meant():
    _, commands = build_parser()
    assert all("--json" in option_names(commands[name]) for name in COMMANDS)
    assert "--output" in option_names(commands["logs"])  # of tvmc logs merge
