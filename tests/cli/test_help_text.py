"""The help: every command's ends with examples that are right, and the first page leads from a model to a library."""

from __future__ import annotations

import importlib
import shlex
import shutil

import numpy as np
import pytest

from rotquant_tvm.cli.config_file import expand_config
from rotquant_tvm.cli.help_text import OVERVIEW, example_commands, help_parts
from rotquant_tvm.cli.main import COMMANDS, build_parser
from rotquant_tvm.cli.options import join_layer_lists

MODEL_FREE = ("formats", "env", "completion")
"""Commands whose examples run anywhere."""


def examples_of(command: str) -> list[str]:
    module = importlib.import_module(f"rotquant_tvm.cli.{command}")
    return example_commands(help_parts(module.__doc__)[1])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_ends_with_examples(tvmc, command):
    examples = examples_of(command)
    assert examples and all(example.split()[:2] == ["tvmc", command] for example in examples)
    text = tvmc(command, "--help").out
    assert text.rstrip().endswith(examples[-1]) or examples[-1] in text.rstrip().splitlines()[-1]
    assert text.index("options:") < text.index("examples:")


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_examples_are_command_lines(command):
    """All of them are parsed as they stand."""
    parser, grammars = build_parser()
    for example in examples_of(command) if command else example_commands(OVERVIEW):
        words = shlex.split(example)[1:]
        arguments = parser.parse_args(join_layer_lists(expand_config(words, grammars)))
        assert arguments.command == words[0]


def test_the_overview_leads_from_a_model_to_a_tuned_library(tvmc):
    order = [shlex.split(example)[1] for example in example_commands(tvmc("--help").out)]
    assert order == ["env", "formats", "inspect", "compile", "run", "eval", "tune", "compile", "bench"]


def test_parts_of_a_text():
    text = "Do it.\n\nFor example:\n  tvmc do it\n  tvmc do it > file   (so)\n\nMore of it.\n"
    assert help_parts(text) == ("Do it.\n\nMore of it.", "examples:\n  tvmc do it\n  tvmc do it > file   (so)")
    assert example_commands(help_parts(text)[1]) == ["tvmc do it", "tvmc do it"]


@pytest.mark.parametrize("command", MODEL_FREE)
def test_examples_that_need_no_model_run(tvmc, command, monkeypatch):
    monkeypatch.setattr("rotquant_tvm.environment.gpus", list)
    for example in examples_of(command)[: 1 if command == "env" else None]:  # it asks the machine, which takes a while
        assert tvmc(*shlex.split(example)[1:]).status == 0, example


def test_examples_over_an_artifact_run(tvmc, artifact, tmp_path, monkeypatch):
    """``model.rq`` is the tiny model's, and ``ids.npz`` has ids of it."""
    shutil.copytree(artifact, tmp_path / "model.rq")
    np.savez(tmp_path / "ids.npz", ids=np.array([[1, 2, 3], [4, 5, 6]]))
    monkeypatch.chdir(tmp_path)
    run = [*examples_of("run"), *(example for example in examples_of("inspect") if "model.rq" in example)]
    assert len(run) >= 4
    for example in run:
        words = shlex.split(example)[1:]
        room = ("--kv-capacity", 256) if words[0] == "run" else ()  # this one's sessions hold 128 by default
        ended = tvmc(*words, *room)
        assert ended.status == 0, (example, ended.err)
    assert np.load(tmp_path / "logits.npz")["logits"].shape == (2, 258)
