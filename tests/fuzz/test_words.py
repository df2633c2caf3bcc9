"""Texts that users write: KV formats, cache configurations, layer overrides, policies, shapes, targets."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from rotquant_tvm.cache_policy import OPTIONS, CachePolicy
from rotquant_tvm.errors import DeviceError, FormatError, RotQuantError, UsageError
from rotquant_tvm.formats import HEAD_DIMS, KVFormat, known_formats, parse_pair
from rotquant_tvm.input_shapes import parse_input_shapes
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.target import resolve_target

from .fuzzing import forms, fuzz

PIECES = (
    *sorted(known_formats()),
    *(
        ":raw",
        ":norm",
        ":mse",
        ":ip",
        "+tcq",
        "+qjl",
        "/",
        ",",
        ";",
        "=",
        ":",
        "+",
        "-",
        " ",
        "\t",
        ".",
        "0",
        "4",
        "64",
    ),
    *OPTIONS,
    *(
        "sinks=",
        "recent=8",
        "center=64",
        "center=33",
        "defer=",
        "9" * 5000,
        "٣",
        "²",
        "\0",
        "\ud800",
        "İ",
        "K",
        "-1",
        "1_0",
    ),
)
WORDS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=9).map("".join) | st.text(max_size=30)
OVERRIDES = (
    st.none()
    | WORDS
    | st.lists(
        st.tuples(st.integers(-5, 5) | st.sampled_from((10**30, -(10**30))), st.sampled_from(PIECES)), max_size=4
    ).map(lambda parts: ";".join(f"{index}={name}" for index, name in parts))
)


@forms(100, 20_000)
def test_a_format_is_read_back_from_its_name(examples):
    def check(text):
        try:
            found = KVFormat.parse(text)
        except FormatError as error:
            assert str(error).strip()
            return
        assert KVFormat.parse(str(found)) == found
        for head_dim in (16, 80, *HEAD_DIMS[-2:]):
            try:
                found.check(head_dim)
            except FormatError:
                continue
            assert 1 <= found.bits_per_element(head_dim) <= 17

    fuzz("KV formats", WORDS, check, examples)


@forms(100, 20_000)
def test_a_configuration_is_read_back_from_its_name(examples):
    def check(texts):
        text, layers = texts
        try:
            config = KVCacheConfig.parse(text, layers)
        except UsageError as error:
            assert str(error).strip()
            return
        again = KVCacheConfig.parse(config.name)
        assert (again.formats, again.policy) == (config.formats, config.policy)
        for formats in config.overrides.values():
            assert parse_pair(formats.name) == (formats.k, formats.v)
        for count in (1, 4):
            try:
                assert len([config.layer_policy(index, count) for index in range(count)]) == count
            except UsageError:
                assert any(not -count <= key < count for key in config.overrides)

    fuzz("cache configurations", st.tuples(WORDS, OVERRIDES), check, examples)


@forms(60, 10_000)
def test_a_policy_is_read_back_from_its_name(examples):
    def check(text):
        try:
            policy = CachePolicy.parse(text)
        except UsageError:
            return
        assert CachePolicy.parse(policy.name) == policy
        assert policy.slots >= 1 and policy.packed_tiles(4096) >= 1

    options = st.lists(
        st.tuples(st.sampled_from((*OPTIONS, "sink", "")), st.integers(-3, 300) | st.sampled_from(PIECES)), max_size=5
    ).map(lambda parts: ",".join(f"{name}={value}" for name, value in parts))
    fuzz("cache policies", options | WORDS, check, examples)


@forms(60, 10_000)
def test_input_shapes_and_targets(examples):
    def check(text):
        for read, errors in ((parse_input_shapes, UsageError), (resolve_target, (UsageError, DeviceError))):
            try:
                read(text)
            except errors as error:
                assert isinstance(error, RotQuantError)

    pieces = (
        "input_ids",
        ":",
        "[",
        "]",
        "1",
        "-1",
        ",",
        " ",
        "llvm",
        "cuda",
        "-mcpu=",
        "x86-64-v3",
        "-arch=",
        "sm_90a",
    )
    pieces += (
        '{"kind": "llvm"}',
        '{"kind":',
        "nvidia/nvidia-h100",
        "-keys=",
        "=",
        "-",
        "{}",
        "[]",
        "10" * 40,
        "\0",
        "\ud800",
    )
    texts = st.lists(st.sampled_from(pieces) | st.text(max_size=2), max_size=8).map("".join)
    fuzz("shapes and targets", texts | texts.map(lambda t: f"llvm {t}"), check, examples)


@pytest.mark.parametrize("value", [None, 3, b"iso3", ["iso3"]])
def test_what_is_no_text_is_refused_too(value):
    with pytest.raises(UsageError):
        KVCacheConfig.parse(value)
