"""Options before the command, where the tvmc of TVM 0.19 had them."""

from __future__ import annotations

import json

import pytest

from rotquant_tvm.cli.leading_options import behind_the_command

COMMANDS = ("compile", "formats")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("-v compile m.gguf", "compile -v m.gguf"),
        ("-vv --json formats rq3", "formats -vv --json rq3"),
        ("--verbose -q compile -v m.gguf", "compile --verbose -q -v m.gguf"),
        ("compile m.gguf -v", "compile m.gguf -v"),
        ("--device cpu -v compile m.gguf", "--device cpu compile -v m.gguf"),
        ("-v", "-v"),
        ("-x formats", "-x formats"),
        ("- formats", "- formats"),
    ],
)
def test_flags_of_every_command_go_behind_it(given, meant):
    assert behind_the_command(given.split(), COMMANDS) == meant.split()


def test_a_command_hears_them(tvmc):
    before, behind = tvmc("--json", "formats", "rq3"), tvmc("formats", "rq3", "--json")
    assert before.status == 0 and before.document == behind.document


def test_other_options_before_it_are_refused(tvmc):
    ended = tvmc("--target", "llvm", "formats")
    assert ended.status == 2 and "llvm" in ended.err


def test_an_error_is_a_document_too(tvmc):
    ended = tvmc("--json", "formats", "rq33")
    assert ended.status == 2 and json.loads(ended.out)["error"]["exit_status"] == 2
