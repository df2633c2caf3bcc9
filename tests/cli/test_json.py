"""``--json``: the schemas are schemas and documented, and each command writes one document, failed or not.

Documents of commands that worked are compared with the schemas wherever a test reads them (``conftest.Ended``).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest

from rotquant_tvm import cli
from rotquant_tvm.cli.main import COMMANDS
from rotquant_tvm.cli.output import Output
from rotquant_tvm.cli.streams import Streams

FOLDER = Path(cli.__file__).parent / "schemas"
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "json.md"


def schema(command: str) -> dict:
    return json.loads((FOLDER / f"{command}.json").read_text(encoding="utf-8"))


def test_every_command_has_a_schema():
    assert {file.stem for file in FOLDER.glob("*.json")} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_schemas_are_whole_and_documented(command):
    found = schema(command)
    jsonschema.Draft202012Validator.check_schema(found)
    assert found["title"] == f"tvmc {command} --json" and found["additionalProperties"] is False
    section = DOCUMENTATION.read_text().partition(f"## {command}\n")[2].partition("\n## ")[0]
    entries = [name for name in found["properties"] if name != "error"]
    assert [name for name in entries if f"| `{name}` |" not in section] == []
    assert [name for name in entries if not found["properties"][name].get("description")] in ([], ["profile"])


@pytest.mark.parametrize("command", COMMANDS)
def test_schemas_refuse_what_is_not_a_document(command):
    validator = jsonschema.Draft202012Validator(schema(command))
    error = {"kind": "UsageError", "message": "no", "exit_status": 2}
    assert validator.is_valid({"error": error})
    for wrong in ({}, {"unknown": 1, "error": error}, {"error": error | {"exit_status": 5}}, {"error": "no"}):
        assert not validator.is_valid(wrong), wrong


@pytest.mark.parametrize(
    ("words", "status", "kind"),
    [
        (("compile", "nowhere.gguf"), 4, "ModelError"),
        (("compile", "m", "--kv-cache", "rq9"), 2, "FormatError"),
        (("compile", "m", "--executor", "graph"), 2, "UsageError"),
        (("tune", "--shapes", "x"), 2, "UsageError"),
        (("run", "nowhere"), 4, "ArtifactError"),
        (("formats", "rq9"), 2, "FormatError"),
        (("inspect", "nowhere"), 4, "ModelError"),
        (("eval", "nowhere.gguf", "--text", "t"), 4, "ModelError"),
        (("bench", "decode", "--kv-cache", "iso7"), 2, "FormatError"),
        (("logs", "merge", "a"), 2, "UsageError"),
        (("env", "now"), 2, "UsageError"),
        (("completion", "fish"), 2, "UsageError"),
    ],
)
def test_a_failure_is_one_document_and_one_line(tvmc, words, status, kind):
    ended = tvmc(*words, "--json")
    error = ended.document["error"]
    assert (ended.status, error["exit_status"], error["kind"]) == (status, status, kind)
    assert " ".join(error["message"].split()) in ended.error


def test_what_was_known_stands_beside_the_error(tvmc, monkeypatch):
    from rotquant_tvm.cli import formats
    from rotquant_tvm.errors import ModelError

    def execute(_arguments, output):
        output.result({"formats": [], "presets": []})
        raise ModelError("refused")

    monkeypatch.setattr(formats, "execute", execute)
    ended = tvmc("formats", "--json")
    assert ended.status == 4 and ended.document["formats"] == []
    assert ended.document["error"] == {"kind": "ModelError", "message": "refused", "exit_status": 4}


def test_numbers_that_json_has_not_are_null(capsys):
    import sys

    output = Output(Streams(sys.stdout, sys.stderr), as_json=True, verbosity=0)
    output.result({"a": math.nan, "b": [1.5, math.inf, (2, -math.inf)], "c": {"d": 0.0}})
    output.finish()
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None, [2, None]], "c": {"d": 0.0}}


def test_verbosity_says_more_step_by_step(tvmc, tmp_path):
    """-v tells details, -vv tracebacks too; the error stays one line."""
    plain, loud, louder = (tvmc("compile", tmp_path / "none.gguf", *words) for words in ((), ("-v",), ("-v", "-v")))
    assert plain.err.count("\n") == 1 == loud.err.count("\n")
    assert "Traceback" not in loud.err and "Traceback" in louder.err
    assert plain.error == loud.error == louder.error
    assert "Traceback" in tvmc("compile", "m", "--kv-capacity", "0", "-vv").err
    assert "Traceback" not in tvmc("compile", "m", "--kv-capacity", "0", "-v").err
