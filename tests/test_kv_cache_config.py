"""KVCacheConfig: what users write, and which layer gets what."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.errors import FormatError, UsageError
from rotquant_tvm.formats import KVFormat
from rotquant_tvm.kv_cache_config import PRESETS, KVCacheConfig, LayerFormats


def names(config: KVCacheConfig, count: int) -> list[str]:
    return [config.layer(i, count).name for i in range(count)]


def test_one_format_is_for_keys_and_values():
    config = KVCacheConfig.parse("iso3")
    assert config.formats == LayerFormats(KVFormat.parse("iso3"), KVFormat.parse("iso3"))
    assert names(config, 3) == ["iso3"] * 3 and config.overrides == {} and config.seed == 0
    assert config.policy == CachePolicy()


def test_a_preset_brings_its_policy_and_unbiased_keys():
    config = KVCacheConfig.parse("rq3")
    assert config.formats.name == "hurwitz3:ip/hurwitz3" and config.policy == PRESETS["rq3"] != CachePolicy()
    assert KVCacheConfig.parse("rq2+tcq").formats.name == "hurwitz2+tcq:ip/hurwitz2+tcq"
    assert KVCacheConfig.parse("rq2") == KVCacheConfig.parse("rq2+tcq") != KVCacheConfig.parse("rq4")
    assert KVCacheConfig.parse("RQ2+tcq:mse") == KVCacheConfig.parse("hurwitz2+tcq,sinks=4,recent=8,center=64")
    assert KVCacheConfig.parse("iso3/ rq3").policy == PRESETS["rq3"]
    assert KVCacheConfig.parse("rq4/f16").policy == KVCacheConfig.parse(" F16 / RQ4 ").policy == PRESETS["rq4"]


def test_options_of_the_policy_follow_the_formats():
    config = KVCacheConfig.parse("iso3/planar2, sinks=4 ,center=64")
    assert config.formats.name == "iso3/planar2" and config.policy == CachePolicy(sinks=4, center=64)
    changed = KVCacheConfig.parse("rq3,recent=0,defer=100")
    assert changed.policy == CachePolicy(sinks=4, center=64, defer=100)
    for text in ("rq3", "iso3/planar2,sinks=4", "q8_0", "rq2+tcq,recent=64"):
        parsed = KVCacheConfig.parse(text)
        assert KVCacheConfig.parse(parsed.name) == parsed


@pytest.mark.parametrize("options", ["sinks=٣", "sinks", "sinks=", "sinks=-1", "sinks=x", "4"])
def test_options_that_cannot_be_read(options):
    text = f"rq3,{options}"
    with pytest.raises(UsageError, match=r"cannot read the cache option .* write it like sinks=4"):
        KVCacheConfig.parse(text)


def test_an_option_that_was_misspelled():
    with pytest.raises(UsageError, match="unknown cache option 'sink'; did you mean sinks; known: sinks"):
        KVCacheConfig.parse("rq3,sink=4")
    with pytest.raises(UsageError, match="unknown cache option 'centre'; did you mean center or recent; known"):
        KVCacheConfig.parse("iso3,centre=64")


def test_unknown_and_impossible_options():
    with pytest.raises(UsageError, match="'sinks' is given twice"):
        KVCacheConfig.parse("rq3,sinks=4,sinks=5")
    with pytest.raises(UsageError, match="unknown cache option 'window'; known: sinks"):
        KVCacheConfig.parse("iso3,window=4")
    with pytest.raises(UsageError, match="multiple of 32"):
        KVCacheConfig.parse("iso3,center=40")


def test_layers_of_sixteen_bits_have_no_policy():
    config = KVCacheConfig.parse("rq3", "0=f16;1=f16/iso3")
    assert config.layer_policy(0, 3) == CachePolicy()
    assert config.layer_policy(1, 3) == config.layer_policy(2, 3) == config.policy


def test_a_pair_is_keys_then_values():
    formats = KVCacheConfig.parse("iso3/planar2").formats
    assert (formats.k.name, formats.v.name, formats.name) == ("iso3", "planar2", "iso3/planar2")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ["iso3"] * 4),
        ("", ["iso3"] * 4),
        ("0=f16", ["f16", "iso3", "iso3", "iso3"]),
        ("0,-1=f16", ["f16", "iso3", "iso3", "f16"]),
        (" 0 , 2 = q8_0/f16 ; -1=iso4 ; ", ["q8_0/f16", "iso3", "q8_0/f16", "iso4"]),
        ("1=f16;2=q8_0", ["iso3", "f16", "q8_0", "iso3"]),
        ("-4=f16;3=f16", ["f16", "iso3", "iso3", "f16"]),
    ],
)
def test_layer_overrides(layers, expected):
    assert names(KVCacheConfig.parse("iso3", layers), 4) == expected


@pytest.mark.parametrize(("layers", "twice"), [("0=f16;0=rq3", 0), ("1,0,1=f16", 1), ("-1=f16; 2=iso4;-1=f16", -1)])
def test_a_layer_is_named_once(layers, twice):
    with pytest.raises(UsageError, match=f"'{layers}' name layer {twice} twice"):
        KVCacheConfig.parse("rq3", layers)


def test_a_layer_is_named_once_from_either_end():
    """Which one counts is known with the number of layers; ``0,-1=f16`` leaves nothing open for a single layer."""
    config = KVCacheConfig.parse("iso3", "1=f16;-1=q8_0")
    assert names(config, 3) == ["iso3", "f16", "q8_0"]
    for index in range(2):
        with pytest.raises(UsageError, match=r"layer 1 of 2 is f16 as 1 and q8_0 as -1 .* name it once"):
            config.layer(index, 2)
    assert names(KVCacheConfig.parse("iso3", "0,-1=f16"), 1) == ["f16"]


@pytest.mark.parametrize("text", ["f16", "0", "=f16", "a=f16", "0.5=f16", "0,=f16", "0;1=f16", "0=f16,0=rq3"])
def test_overrides_that_cannot_be_read(text):
    with pytest.raises(UsageError, match=r"cannot read the layer overrides .* write them like '0,-1=f16;5=iso4'"):
        KVCacheConfig.parse("rq3", text)


@pytest.mark.parametrize(("text", "layers"), [("rq9", None), ("iso3/", None), ("a/b/c", None), ("rq3", "0=rq9")])
def test_unknown_formats(text, layers):
    with pytest.raises(FormatError):
        KVCacheConfig.parse(text, layers)


@pytest.mark.parametrize(("layers", "key"), [("4=f16", 4), ("-5=f16", -5), ("0,7=f16", 7)])
def test_layers_that_the_model_does_not_have(layers, key):
    config = KVCacheConfig.parse("rq3", layers)
    for index in range(4):  # for every layer, so also if the first one is compiled alone
        with pytest.raises(UsageError, match=f"layer override {key}: the model has layers 0 to 3"):
            config.layer(index, 4)


def test_every_layer_and_role_has_its_own_rotation():
    config = KVCacheConfig.parse("dense3")
    drawn = [codec.rotation.data for layer in range(3) for codec in config.codecs(layer, 3, 64)]
    for i, one in enumerate(drawn):
        assert not any(np.array_equal(one, other) for other in drawn[:i])
    again = [codec.rotation.data for layer in range(3) for codec in config.codecs(layer, 3, 64)]
    np.testing.assert_array_equal(drawn, again)


def test_the_seed_draws_other_rotations():
    first, second = (KVCacheConfig.parse("iso3", seed=seed).codecs(0, 1, 64)[0] for seed in (0, 1))
    assert not np.array_equal(first.rotation.data, second.rotation.data)
    assert first.format == second.format


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0", None])
def test_seeds_that_are_refused(seed):
    with pytest.raises(UsageError, match="seed"):
        KVCacheConfig.parse("rq3", seed=seed)


def test_a_configuration_takes_no_layers_beside_it():
    config = KVCacheConfig.parse("rq3", "0=f16")
    assert KVCacheConfig.of(config) is config and KVCacheConfig.of("rq3", "0=f16") == config
    for layers in ("0=f16", ""):
        with pytest.raises(UsageError, match="kv_layers"):
            KVCacheConfig.of(config, layers)


def test_a_head_dim_that_a_format_cannot_take():
    with pytest.raises(FormatError, match="turbo3 cannot take head_dim 96"):
        KVCacheConfig.parse("f16/turbo3").codecs(0, 1, 96)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KVCacheConfig.parse("rq3").seed = 3


@given(count=st.integers(1, 40), data=st.data())
def test_negative_indices_count_from_the_end(count, data):
    index = data.draw(st.integers(-count, count - 1))
    found = names(KVCacheConfig.parse("iso3", f"{index}=f16"), count)
    assert found[index] == "f16" and found.count("f16") == 1


def test_what_a_format_cannot_take_stays_in_16_bits_if_asked():
    config = dataclasses.replace(KVCacheConfig.parse("turbo3/iso3", "2=iso4/turbo2"), on_unsupported="keep")
    fitted, kept = config.fitted([64, 48, 48, 128])
    assert names(fitted, 4) == ["turbo3/iso3", "f16/iso3", "iso4/f16", "turbo3/iso3"]
    assert {index: set(reasons) for index, reasons in kept.items()} == {1: {"k"}, 2: {"v"}}
    assert "turbo3 cannot take head_dim 48" in kept[1]["k"]
    assert fitted.codecs(1, 4, 48)[0].format.name == "f16" and fitted.on_unsupported == "keep"


def test_a_layer_counted_from_the_end_can_be_kept_in_16_bits():
    config = dataclasses.replace(KVCacheConfig.parse("iso3", "-1=turbo3"), on_unsupported="keep")
    fitted, kept = config.fitted([64, 48])
    assert names(fitted, 2) == ["iso3", "f16"] and set(kept) == {1}


def test_by_default_nothing_is_kept():
    config = KVCacheConfig.parse("turbo3")
    assert config.fitted([48, 64]) == (config, {})
    with pytest.raises(FormatError, match="cannot take head_dim 48"):
        config.codecs(0, 2, 48)


def test_heads_that_no_format_takes_are_refused_in_any_case():
    config = KVCacheConfig(LayerFormats.parse("turbo3"), on_unsupported="keep")
    with pytest.raises(FormatError, match="f16 cannot take head_dim 24"):
        config.fitted([24])
    with pytest.raises(UsageError, match="on_unsupported is 'drop'; it must be refuse or keep"):
        KVCacheConfig(LayerFormats.parse("turbo3"), on_unsupported="drop")
