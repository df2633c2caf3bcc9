"""Options of the former tvmc: each is answered with what replaces it, unless it is still there."""

from __future__ import annotations

import pytest

from rotquant_tvm.cli.former_options import FORMER, check_former_options
from rotquant_tvm.cli.main import build_parser
from rotquant_tvm.errors import UsageError


@pytest.mark.parametrize(
    ("words", "option", "said"),
    [
        (["compile", "m", "--target", "llvm", "--executor", "graph"], "--executor", "virtual machine"),
        (["compile", "--executor-graph-link-params", "1", "m"], "--executor-graph-link-params", "leave the option out"),
        (["compile", "--runtime=crt", "m"], "--runtime", "one executor and one runtime"),
        (["compile", "--target-llvm-mcpu=skylake", "m"], "--target-llvm-mcpu", "--target 'llvm -mcpu"),
        (["compile", "m", "--cross-compiler", "aarch64-linux-gnu-gcc"], "--cross-compiler", "CXX"),
        (["compile", "m", "-f", "mlf"], "-f", "artifact folder"),
        (["compile", "m", "-fmlf"], "-f", "artifact folder"),
        (["compile", "m", "--output-format", "so"], "--output-format", "artifact folder"),
        (["compile", "m", "--module-name", "x"], "--module-name", "prefill, decode"),
        (["compile", "m", "--desired-layout", "NHWC"], "--desired-layout", "layout"),
        (["compile", "m", "--mixed-precision"], "--mixed-precision", "--dtype float16"),
        (["compile", "m", "--workspace-pools-size-hint-bytes=flash:8"], "--workspace-pools", "pools"),
        (["compile", "m", "--use-vm"], "--use-vm", "Relax"),
        (["tune", "m", "--tuner", "xgb"], "--tuner", "the one search of MetaSchedule replaces them all: leave it out"),
        (["tune", "m", "--enable-autoscheduler"], "--enable-autoscheduler", "MetaSchedule"),
        (["tune", "m", "--cache-line-bytes", "64"], "--cache-line-bytes", "--target"),
        (["tune", "m", "--include-simple-tasks"], "--include-simple-tasks", "--tasks"),
        (["tune", "m", "--log-estimated-latency"], "--log-estimated-latency", "tvmc logs list"),
        (["run", "m", "--end-to-end"], "--end-to-end", "--print-time"),
        (["run", "m", "--print-top", "5"], "--print-top", "--outputs"),
        (["run", "m", "--rpc-tracker", "host:9090"], "--rpc-tracker", "copy the folder"),
        (["micro", "create-project"], "tvmc micro", "microTVM is gone"),
    ],
)
def test_each_says_what_to_do_instead(tvmc, words, option, said):
    ended = tvmc(*words)
    assert ended.status == 2 and ended.out == ""
    assert option in ended.error and said in ended.error


def test_what_is_an_option_today_is_not_former():
    """An option in both lists is today's: what this file says of it is not heard."""
    _, grammars = build_parser()
    known = {name: list(grammar._option_string_actions) for name, grammar in grammars.items()}
    for command, former in FORMER.items():
        for option in former:
            if option in known[command]:
                check_former_options([command, option], known)
            else:
                with pytest.raises(UsageError, match=option):
                    check_former_options([command, option], known)
    check_former_options(["formats", "--tuner"], known)  # never was one of that command's
    check_former_options(["compile", "m", "--", "--executor"], known)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["compile", "m", "--opt-level", "2"], "opt_level", 2),
        (["compile", "m", "--verbose", "--verbose"], "verbosity", 2),
        (["run", "a", "-i", "x.npz"], "inputs", "x.npz"),
        (["run", "a", "-o", "y.npz"], "outputs", "y.npz"),
        (["tune", "m", "--min-repeat-ms", "100", "--trials", "10"], "min_repeat_ms", 100),
    ],
)
def test_those_of_the_same_meaning_have_their_old_names(words, name, value):
    parser, _ = build_parser()
    found = getattr(parser.parse_args(words), name)
    assert found == value or str(found) == value
