"""``tvmc formats``: the figures are those of the formats themselves."""

from __future__ import annotations

import re

import pytest

from rotquant_tvm.formats import HEAD_DIMS, KVFormat, TileLayout, known_formats
from rotquant_tvm.kv_cache_config import PRESETS, KVCacheConfig


def test_every_spelling_is_listed(tvmc):
    listed = tvmc("formats", "--json").document["formats"]
    assert [entry["name"] for entry in listed] == list(known_formats())


def test_sizes_are_those_of_the_tiles(tvmc):
    dims = (64, 80, 256)
    listed = tvmc("formats", "--json", "--head-dims", ",".join(map(str, dims))).document["formats"]
    for entry in listed:
        fmt = KVFormat.parse(entry["name"])
        for dim in dims:
            if dim not in entry["head_dims"]:
                assert str(dim) not in entry["bits_per_element"]
                continue
            assert entry["bytes_per_token"][str(dim)] == TileLayout(fmt, fmt, dim).tile_bytes / 32
            assert entry["bits_per_element"][str(dim)] == fmt.bits_per_element(dim)


def test_head_dims_are_those_a_format_takes(tvmc):
    turbo, iso = tvmc("formats", "--json", "turbo3", "iso3").document["formats"]
    assert turbo["head_dims"] == [32, 64, 128, 256, 512] and iso["head_dims"] == list(HEAD_DIMS)


def test_the_table_shows_what_the_document_holds(tvmc):
    shown = tvmc("formats", "iso3-2d", "q8_0", "--head-dims", "128").out
    assert "iso3-2d (= planar3)" in shown and "3.125" in shown and "32–256 by 16, 512" in shown
    assert "8.5" in shown and "block" in shown and "preset" not in shown


def test_presets_are_shown_with_the_formats_and_the_policy_that_compile_takes(tvmc):
    document = tvmc("formats", "--json").document
    presets = {preset["name"]: preset for preset in document["presets"]}
    assert set(presets) == set(PRESETS) == {entry["name"] for entry in document["formats"] if entry["preset"]}
    for name, preset in presets.items():
        written = f"{preset['k']}/{preset['v']},{preset['policy']}"
        assert KVCacheConfig.parse(written) == KVCacheConfig.parse(name)
    assert {entry["gain"] for entry in document["formats"] if entry["preset"]} == {"ip/mse"}
    assert all(entry["same_as"] is None for entry in document["formats"] if entry["preset"])


def test_the_table_of_presets_has_those_asked_for(tvmc):
    shown = tvmc("formats", "rq3", "iso3").out
    assert "rq3 (preset)" in shown and "rq2" not in shown
    assert re.search("^rq3 +hurwitz3:ip +hurwitz3 +sinks=4,recent=8,center=64$", shown, re.M)


def test_bits_count_the_plane_of_further_bits(tvmc):
    listed = tvmc("formats", "--json", "turbo2.5", "turbo3+qjl", "qjl1", "q4_0").document["formats"]
    assert [entry["bits"] for entry in listed] == [2.5, 3, 1, 4]


@pytest.mark.parametrize("dims", ["63", "64,16", "528", "0"])
def test_head_dims_that_no_format_takes_are_refused(tvmc, dims):
    ended = tvmc("formats", "--head-dims", dims)
    assert ended.status == 2 and ended.out == ""
    assert "multiples of 16 from 32 to 256, and 512" in ended.error or "give 1 or more" in ended.error


def test_a_head_dim_that_some_formats_take_is_shown(tvmc):
    shown = tvmc("formats", "turbo3", "iso3", "--head-dims", "80", "--json").document["formats"]
    assert [list(entry["bits_per_element"]) for entry in shown] == [[], ["80"]]


@pytest.mark.parametrize("word", ["iso9", "q4_1", "", "rq3:what"])
def test_an_unknown_format_is_named(tvmc, word):
    ended = tvmc("formats", word)
    assert ended.status == 2 and ended.out == "" and f"'{word}'" in ended.error
