"""Every architecture of transformers that an import takes: through the packed cache it computes what torch computes."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from rotquant_tvm.passes.find_attention import find_attention

import rotquant_tvm
from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend import ImportedModel, from_torch
from rotquant_tvm.kv_cache_config import KVCacheConfig

from ..sampling import sampled
from .architectures import ARCHITECTURES, REFUSED, Architecture
from .fake_quantized import Turn, converse, padded_logits, replay

# Soft-capping, a scale of its own and a window beside a global layer; ``test_half_models`` has a second architecture.
ORDINARY = ["gemma2"]
IMPORTED = [*ORDINARY, "qwen3_moe", "phi", "falcon"]
MIXED = ("hurwitz3", "0=f16")
CAPACITY = 128
ROUNDING = 1e-5
"""Of the largest logit: float32 sums in another order, between computations over the same stored codes."""
BYTES = 2e-4
"""The same after a decode step: where the CPU multiplies bytes, queries and weights have 15 bits and a sign."""
BOUNDARY = 2e-4
"""Of a vector's largest element: how far from a boundary the values are whose codes torch chooses otherwise."""
HALF = 1e-3
"""Of the largest logit: what rounding keys and values to 16 bits (2⁻¹¹ each) may move, through two layers."""


@cache
def imported(name: str) -> ImportedModel:
    return from_torch(ARCHITECTURES[name].model())


def conversation(name: str, formats: tuple[str, ...]) -> list[Turn]:
    session = rotquant_tvm.compile(imported(name), KVCacheConfig.parse(*formats)).session(2, CAPACITY)
    return converse(session, KVCacheConfig.parse(*formats), ARCHITECTURES[name].head_dim)


def check_replay(architecture: Architecture, turns: list[Turn], formats: tuple[str, ...]) -> float:
    """Compare every turn with torch over the stored codes; returns the largest logit."""
    config = KVCacheConfig.parse(*formats)
    expected, count, furthest = replay(architecture.model(), turns, config, architecture.windows)
    size = max(np.abs(logits).max() for logits in expected)
    errors = {False: 0.0, True: 0.0}
    for turn, logits in zip(turns, expected, strict=True):
        errors[turn.decode] = max(errors[turn.decode], np.abs(turn.logits - logits).max() / size)
    told = f"{errors[False]:.1e} and (decode) {errors[True]:.1e} of the largest logit"
    print(f"error {told}, {count} codes differ, by {furthest:.1e} at most")
    assert size > 0.5 and errors[False] <= ROUNDING and errors[True] <= BYTES
    assert furthest <= BOUNDARY
    return size


def rows_of(turns: list[Turn]) -> list[np.ndarray]:
    """The ids of each row of a whole conversation."""
    return [np.concatenate([turn.ids[row] for turn in turns]) for row in range(2)]


@pytest.mark.parametrize("name", sampled(ARCHITECTURES, IMPORTED))
def test_every_attention_is_found(name):
    architecture, module = ARCHITECTURES[name], imported(name).mod
    sites = find_attention(module["main"])
    assert [site.reason for site in sites] == ["", ""]
    assert {(site.heads, site.kv_heads, site.head_dim) for site in sites} == {
        (4, architecture.kv_heads, architecture.head_dim)
    }
    scale = architecture.scale or architecture.head_dim**-0.5
    assert [site.scale for site in sites] == pytest.approx([scale] * 2)
    assert tuple(site.window for site in sites) == architecture.windows
    assert [site.softcap for site in sites] == [architecture.softcap] * 2


@pytest.mark.parametrize("name", REFUSED)
def test_other_attention_is_refused_by_name(name):
    architecture, message = REFUSED[name]
    with pytest.raises(ModelError, match=message) as refusal:
        from_torch(architecture.model())
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(["gemma2", "mistral", "qwen3_moe"], ORDINARY))
def test_a_conversation_equals_torch_over_the_stored_codes(name):
    """A layer in 16 bits and one in 3, in one compile."""
    check_replay(ARCHITECTURES[name], conversation(name, MIXED), MIXED)


@pytest.mark.full
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cache_in_16_bits_equals_torch(name):
    """Also torch without any rounding of keys and values, in one padded batch."""
    architecture = ARCHITECTURES[name]
    turns = conversation(name, ("f16",))
    size = check_replay(architecture, turns, ("f16",))
    for side in ("left", "right"):
        first = padded_logits(architecture.model(), turns[0].ids, side)
        assert np.abs(turns[0].logits - first).max() <= ROUNDING * size
        last = padded_logits(architecture.model(), rows_of(turns), side)
        assert np.abs(turns[-1].logits - last).max() <= HALF * size


@pytest.mark.full
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cache_in_3_bits_equals_fake_quantization(name):
    architecture = ARCHITECTURES[name]
    turns = conversation(name, ("hurwitz3",))
    size = check_replay(architecture, turns, ("hurwitz3",))
    plain = padded_logits(architecture.model(), rows_of(turns), "left")
    assert np.abs(turns[-1].logits - plain).max() > 5 * HALF * size  # three bits do show


