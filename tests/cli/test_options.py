"""The options that subcommands share: what they make of a command line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm.cache_policy import OPTIONS, CachePolicy
from rotquant_tvm.cli.options import Parser, add_kv_options, kv_cache_text
from rotquant_tvm.errors import UsageError
from rotquant_tvm.kv_cache_config import PRESETS, KVCacheConfig


def text(*words: str) -> str:
    parser = Parser(allow_abbrev=False)
    add_kv_options(parser)
    return kv_cache_text(parser.parse_args(words))


def config(*words: str) -> KVCacheConfig:
    return KVCacheConfig.parse(text(*words))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "rq3"),
        (["--kv-cache", "iso3/planar3"], "iso3/planar3"),
        (["-ctk", "iso3"], "iso3/f16"),
        (["-ctv", "iso3"], "f16/iso3"),
        (["-ctk", "iso3", "-ctv", "q8_0"], "iso3/q8_0"),
        (["--kv-cache", "rq3,sinks=8"], "rq3,sinks=8"),
    ],
)
def test_without_flags_the_text_is_what_was_written(words, expected):
    assert text(*words) == expected


def test_flags_replace_only_their_part_of_a_preset():
    preset = PRESETS["rq3"]
    assert config().policy == preset == CachePolicy(sinks=4, recent=8, center=64)
    assert config("--kv-sinks", "0").policy == CachePolicy(sinks=0, recent=8, center=64)
    assert config("--kv-recent", "100").policy == CachePolicy(sinks=4, recent=100, center=64)
    assert config("--kv-center", "128").policy == CachePolicy(sinks=4, recent=8, center=128)
    assert config("--no-kv-center").policy == CachePolicy(sinks=4, recent=8)
    assert config("--kv-defer", "512").policy == CachePolicy(sinks=4, recent=8, center=64, defer=512)
    assert config("--kv-sinks", "1").formats == config().formats


def test_flags_give_a_format_a_policy():
    assert config("--kv-cache", "iso3").policy == CachePolicy()
    found = config("-ctk", "iso3", "-ctv", "planar3", "--kv-center", "32", "--kv-sinks", "2")
    assert found.formats.name == "iso3/planar3" and found.policy == CachePolicy(sinks=2, center=32)


def test_flags_go_with_other_options_in_the_text():
    assert config("--kv-cache", "iso3, sinks=4", "--kv-recent", "8").policy == CachePolicy(sinks=4, recent=8)


@given(
    policy=st.builds(
        CachePolicy,
        sinks=st.integers(0, 999),
        recent=st.integers(0, 999),
        center=st.integers(1, 9).map(lambda blocks: 32 * blocks),
        defer=st.integers(0, 999),
    )
)
def test_four_flags_are_the_whole_policy(policy):
    flags = [word for name in OPTIONS for word in (f"--kv-{name}", str(getattr(policy, name)))]
    assert config("--kv-cache", "rq4", *flags).policy == policy


@pytest.mark.parametrize("option", ["--kv-capacity", *(f"--kv-{name}" for name in OPTIONS)])
@pytest.mark.parametrize("value", [2**31, 10**15, "9" * 400])
def test_more_tokens_than_lengths_can_count_are_refused_with_the_limit(option, value):
    with pytest.raises(UsageError, match=f"argument {option}: [0-9]+ is too large; give 2147483647 or less"):
        text(option, str(value))
    text(option, "2147483616")  # a multiple of 32


@pytest.mark.parametrize("name", OPTIONS)
def test_one_option_twice_is_refused_by_name(name):
    with pytest.raises(UsageError, match=f"--kv-{name} and {name}= in 'iso3, {name} =64' say the same thing"):
        text("--kv-cache", f"iso3, {name} =64", f"--kv-{name}", "64")


def test_centring_on_and_off_is_refused():
    with pytest.raises(UsageError, match="--no-kv-center and center= in 'rq3,center=64'"):
        text("--kv-cache", "rq3,center=64", "--no-kv-center")
    for words in (["--kv-center", "64", "--no-kv-center"], ["--no-kv-center", "--kv-center", "64"]):
        with pytest.raises(UsageError, match="not allowed with argument"):
            text(*words)


def test_formats_given_twice_are_refused():
    with pytest.raises(UsageError, match="--kv-cache and -ctk/-ctv"):
        text("--kv-cache", "rq3", "-ctk", "iso3")


@pytest.mark.parametrize("option", ["-ctk", "-ctv"])
def test_llama_spelled_options_take_a_format_alone(option):
    with pytest.raises(UsageError, match=f"{option} takes one format, not 'rq3,sinks=8'; .*--kv-sinks"):
        text(option, "rq3,sinks=8")


@pytest.mark.parametrize(
    "words",
    [["--kv-sinks", "-1"], ["--kv-recent", "x"], ["--kv-center", "0"], ["--kv-center", "31"], ["--kv-defer", ""]],
)
def test_numbers_that_are_no_numbers_of_tokens(words):
    with pytest.raises(UsageError, match=f"argument {words[0]}"):
        text(*words)


def test_a_block_that_is_no_multiple_of_a_tile():
    with pytest.raises(UsageError, match=r"center is 40; .* multiple of 32"):
        config("--kv-center", "40")
