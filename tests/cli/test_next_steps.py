"""What a command says can be done next: command lines that are right, on standard error and not always."""

from __future__ import annotations

import shlex

import pytest

from rotquant_tvm.cli.main import build_parser
from rotquant_tvm.cli.next_steps import next_steps

REPORT = {"report": {"tuning_records": []}, "artifact": "/far/away/model.rq"}
RECORDS = {"records": [{}], "folder": "/logs/llvm"}


def steps(words: str, document=None) -> list[str]:
    """The next command lines after one; they are parsed, too."""
    parser, _ = build_parser()
    lines = [line.partition("   (")[0] for line in next_steps(parser.parse_args(shlex.split(words)), document or {})]
    for line in lines:
        assert line.startswith("tvmc ")
        parser.parse_args(shlex.split(line)[1:])
    return lines


@pytest.mark.parametrize(
    ("words", "document", "expected"),
    [
        ("compile m.gguf", REPORT, ["tvmc run /far/away/model.rq --prompt 'Once upon a time'", "tvmc tune m.gguf"]),
        (
            "compile m.gguf --kv-cache iso3 --kv-layers=-1=f16 --no-kv-center --kv-sinks 0 --target cuda",
            REPORT,
            ["tvmc tune m.gguf --kv-cache iso3 --kv-layers=-1=f16 --kv-sinks 0 --no-kv-center --target cuda"],
        ),
        ("compile m.gguf -ctk iso3", REPORT, ["tvmc tune m.gguf -ctk iso3"]),
        ("tune m.gguf --kv-cache rq2 --target cuda", RECORDS, ["tvmc compile m.gguf --kv-cache rq2 --target cuda"]),
        ("compile m.gguf", REPORT | {"tokenizer": False}, ["tvmc run /far/away/model.rq --print-time"]),
        ("inspect m.rq", {"artifact": "m.rq", "tokenizer": False}, ["tvmc run m.rq --print-time"]),
        ("tune m.gguf --tuning-records logs", RECORDS, ["tvmc compile m.gguf --tuning-records logs"]),
        ("tune m.gguf -o logs", RECORDS, ["tvmc compile m.gguf --tuning-records logs", "tvmc logs list logs"]),
        ("tune m.gguf --tasks list", {"tasks": []}, ["tvmc tune m.gguf --tasks 0"]),
        ("run m.rq --prompt x", {"mode": "generate"}, ["tvmc run m.rq --prompt x --print-time"]),
        ("inspect m.gguf --kv-cache rq4", {"sites": []}, ["tvmc compile m.gguf --kv-cache rq4"]),
        ("inspect m.rq", {"artifact": "m.rq"}, ["tvmc run m.rq --prompt"]),
        ("formats", {}, ["tvmc compile model.gguf"]),
        ("env", {}, ["tvmc compile model.gguf"]),
        ("eval m.gguf --text t --kv-cache rq2", {}, ["tvmc compile m.gguf --kv-cache rq2"]),
        ("bench decode --target llvm", {}, ["tvmc tune"]),
        ("logs list a", {"logs": [{}]}, ["tvmc logs check a"]),
        ("logs merge a -o b", {"logs": [{}]}, ["tvmc compile model.gguf --tuning-records b"]),
    ],
)
def test_the_next_command_says_the_same_again(words, document, expected):
    found = steps(words, document)
    for line in expected:
        assert any(each.startswith(line) for each in found), found


@pytest.mark.parametrize(
    ("words", "document"),
    [
        ("tune m.gguf", {"records": []}),
        ("run m.rq", {"mode": "prefill"}),
        ("run m.rq --prompt x --print-time", {"mode": "generate"}),
        ("logs list", {"logs": []}),
        ("logs check", {"logs": [{}]}),
        ("completion bash", {}),
    ],
)
def test_sometimes_there_is_nothing_to_say(words, document):
    assert steps(words, document) == []


def test_a_tuned_library_is_not_to_be_tuned():
    tuned = {"artifact": "m.rq", "report": {"tuning_records": [{"record": "x", "kernels": []}]}}
    assert not any("tune" in line for line in steps("compile m.gguf", tuned))


def test_it_is_said_on_standard_error_alone(tvmc):
    plain = tvmc("formats", "rq3")
    assert plain.err.startswith("next: tvmc compile") and "next:" not in plain.out
    assert tvmc("formats", "rq3", "--json").err == ""
    quiet = tvmc("formats", "rq3", "--quiet")
    assert quiet.err == "" and quiet.out == plain.out
    assert tvmc("formats", "rq3", "-q", "--json").out == tvmc("formats", "rq3", "--json").out
    failed = tvmc("formats", "rq9", "-q")
    assert failed.status == 2 and "rq9" in failed.error
