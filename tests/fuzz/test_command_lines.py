"""Words and option files that ``tvmc`` is given: all end in arguments or in a usage error."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import pytest
from hypothesis import strategies as st

from rotquant_tvm.cli.config_file import expand_config
from rotquant_tvm.cli.main import build_parser
from rotquant_tvm.cli.options import join_layer_lists, kv_cache_config
from rotquant_tvm.cli.pass_options import _value
from rotquant_tvm.errors import UsageError

from .fuzzing import JSON_PIECES, PLAIN, changed, forms, fuzz, mutated

PARSER, COMMANDS = build_parser()
OPTIONS = sorted({word for parser in COMMANDS.values() for word in parser._option_string_actions})
VALUES = (
    *(
        "rq3",
        "iso3/planar3",
        "f16",
        "0,-1=f16;5=iso4",
        "-1=f16",
        "llvm",
        "cuda",
        "4096",
        "0",
        "-1",
        "1e999",
        "nan",
        "3.5",
    ),
    *("", " ", "=", ",", "--", "-", "9" * 5000, "\0", "\ud800", "٣", "1_0", "ids:[1,-1]", "ir,tir", "list", "compile"),
)
WORD = st.sampled_from([*COMMANDS, *OPTIONS, *VALUES]) | st.text(max_size=5)
LINES = st.tuples(
    st.sampled_from([*COMMANDS]),
    st.lists(WORD | st.tuples(st.sampled_from(OPTIONS), st.sampled_from(VALUES)).map("=".join), max_size=8),
).map(lambda pair: [pair[0], *pair[1]])


def read(words):
    """Arguments of words; None for a usage error, or where help was asked for."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return PARSER.parse_args(join_layer_lists(expand_config(words, COMMANDS)))
        except UsageError as error:
            assert str(error).strip()
        except SystemExit as stop:
            assert stop.code == 0, "help and version end well"
    return None


@forms(50, 12_000)
def test_words_end_in_arguments_or_a_usage_error(examples):
    def check(words):
        found = read(words)
        if found is not None and hasattr(found, "kv_cache"):
            with contextlib.suppress(UsageError):
                kv_cache_config(found)

    fuzz("command lines", LINES | st.lists(WORD, max_size=6), check, examples)


@pytest.mark.parametrize("ending", ["toml", "json"])
@forms(30, 5_000)
def test_option_files_end_in_words_or_a_usage_error(examples, ending, tmp_path):
    path = tmp_path / f"options.{ending}"
    names = [option.removeprefix("--") for option in OPTIONS if option.startswith("--")]
    valid = {
        "kv-cache": "iso3",
        "compile": {"target": "cuda", "dump-code": ["ir"], "print-pass-times": True},
        "json": True,
    }

    def check(content):
        path.write_bytes(content)
        for command in ("compile", "formats"):
            read([command, "--config", str(path)])

    toml = b'kv-cache = "rq3"\n[compile]\ntarget = "cuda"\ndump-code = ["ir"]\n[run]\n'
    texts = mutated(
        st.sampled_from((toml, json.dumps(valid).encode())), (*JSON_PIECES, b"[[a]]", b"1979-05-27", b"'''")
    )
    options = st.dictionaries(st.sampled_from([*names, *COMMANDS, "x"]), PLAIN, max_size=4)
    documents = (changed(valid) | options).map(lambda value: json.dumps(value).encode())
    fuzz(f"option files ({ending})", texts | documents, check, examples)


def test_digits_beyond_pythons_bound_are_a_usage_error():
    assert read(["compile", "m", "--kv-capacity", "9" * (sys.get_int_max_str_digits() + 1)]) is None


def test_a_deeply_nested_value_of_a_pass_option_is_text():
    assert _value("[" * 100_000) == "[" * 100_000
