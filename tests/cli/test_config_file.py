"""Options from a file."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm.cli.config_file import MAX_BYTES, expand_config
from rotquant_tvm.cli.main import build_parser
from rotquant_tvm.errors import UsageError

PARSER, COMMANDS = build_parser()


@pytest.fixture
def write(tmp_path):
    def to_file(text: str, name: str = "options.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return to_file


def parsed(*words):
    return PARSER.parse_args(expand_config([str(word) for word in words], COMMANDS))


def test_a_file_gives_what_the_command_line_leaves_open(write):
    path = write('kv-cache = "iso3"\nkv-capacity = 128\n[compile]\ntarget = "cuda"\nprint-pass-times = true\n')
    found = parsed("compile", "m", "--config", path, "--kv-capacity", "64")
    assert (found.kv_cache, found.kv_capacity, found.target) == ("iso3", 64, "cuda")
    assert found.print_pass_times is True and found.model == "m"


def test_a_json_file_says_the_same(write):
    document = {"kv-cache": "iso3", "compile": {"dump-code": ["ir", "tir"], "print-pass-times": False}}
    found = parsed("compile", "m", f"--config={write(json.dumps(document), 'options.json')}")
    assert found.kv_cache == "iso3" and found.dump_code == ["ir", "tir"] and not found.print_pass_times


def test_options_of_other_commands_are_left_alone(write):
    path = write('kv-cache = "iso3"\n[compile]\ntarget = "cuda"\n')
    assert parsed("run", "a", "--config", path).artifact == "a"


def test_of_two_files_the_later_counts(write):
    first, second = write('kv-cache = "iso3"'), write('kv-cache = "turbo3"', "more.toml")
    assert parsed("compile", "m", "--config", first, "--config", second).kv_cache == "turbo3"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('kv-cach = "rq3"', "'kv-cach' is no option of any command of tvmc; did you mean kv-cache"),
        ('[compile]\nprompt = "x"', "'prompt' is no option of tvmc compile"),
        ('[compiel]\ntarget = "cuda"', "no command 'compiel'; did you mean compile"),
        ("kv-cache = ", "neither TOML nor JSON"),
        ("[compile]\nprint-pass-times = 1", "is a flag"),
        ("kv-capacity = true", "text or numbers"),
        ("kv-cache = {a = 1}", "no command 'kv-cache'"),
        ("help = true", "'help' is no option"),
        ('config = "x"', "'config' is no option"),
    ],
)
def test_what_a_file_may_not_say(tvmc, write, text, said):
    ended = tvmc("compile", "m", "--config", write(text))
    assert ended.status == 2 and said in ended.error


def test_a_value_is_checked_like_one_of_the_command_line(tvmc, write):
    ended = tvmc("compile", "m", "--config", write("kv-capacity = 0"))
    assert ended.status == 2 and "too small" in ended.error


def test_files_that_cannot_be_read(tvmc, tmp_path, write):
    assert "cannot be read" in tvmc("formats", "--config", tmp_path / "none.toml").error
    assert "needs a file" in tvmc("formats", "--config").error
    assert "larger than" in tvmc("formats", "--config", write("#" * (MAX_BYTES + 1))).error
    assert "no table" in tvmc("formats", "--config", write("[1]", "list.json")).error
    assert "neither TOML nor JSON" in tvmc("formats", "--config", write("[" * 100_000, "deep.json")).error


@given(st.binary(max_size=200), st.sampled_from(["x.toml", "x.json"]))
def test_any_bytes_end_in_words_or_a_usage_error(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        words = expand_config(["formats", "--config", str(path)], COMMANDS)
    except UsageError:
        return
    assert words[0] == "formats"
