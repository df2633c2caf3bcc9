"""Layers with a window through the passes: rings of tiles in the graph, and their numbers over many turns of a ring."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from rotquant_tvm.passes.quantize_kv_cache import read_cache_info

from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.window_ring import WindowRing

from .cached_step import CachedStep, check_numbers, check_replay, expected_logits, operators, stages
from .tiny_model import VOCAB, TinyModel

WINDOW, CAPACITY = 40, 250
MODEL = TinyModel(window=WINDOW)
CONFIG = KVCacheConfig.parse("hurwitz3:ip/iso4,sinks=3,recent=2,center=32", "0=f16")
STEPS = ([100, 7, 0], [50, 60, 1], None, [3, 70, 95], None, None, [64, 64, 90], None)
"""New tokens of each sequence (chunks longer than a ring among them), or None for a decode step."""


@cache
def step(stage: str) -> CachedStep:
    """The model after a pass."""
    return CachedStep(MODEL, stages(MODEL, CONFIG)[stage])


@cache
def conversation():
    """``STEPS`` over the reference form."""
    rng, calls, state = np.random.default_rng(5), [], step("quantize").create(3, CAPACITY)
    for new in STEPS:
        calls.append(step("quantize").call(state, rng.integers(0, VOCAB, (3, max(new or [1]))), new))
        state = calls[-1].after
    return calls


@pytest.mark.full
def test_numbers_are_those_of_the_window_before_and_after_lowering():
    """A 16-bit layer without a policy below a quantized one with sinks, a 16-bit ring and centres.

    The cases of ``cached_step`` that have a window go around their rings once.
    """
    assert conversation()[-1].after[-1].max() > 5 * WINDOW
    replayed = step("lower").replay(conversation())
    check_replay(conversation(), replayed)
    for call in replayed:
        check_numbers(call, expected_logits(MODEL, CONFIG, call))


def test_a_cache_is_as_large_as_its_window():
    """Whatever the capacity, but where that is smaller."""
    rings = [WindowRing(WINDOW, CONFIG.layer_policy(layer, 2)) for layer in range(2)]
    assert [ring.tiles for ring in rings] == [3, 3]
    for capacity, tiles in ((1, [1, 1]), (64, [2, 1]), (90, [3, 2]), (250, [3, 3]), (100_000, [3, 3])):
        straight, packed, centre, _, *_ = step("lower").create(2, capacity)
        assert [straight.shape[2], packed.shape[2]] == tiles and centre.shape[2] == tiles[1]


def test_a_chunk_is_attended_to_before_it_enters():
    straight = KVCacheConfig.parse("f16")
    for config, second in ((straight, ["append"]), (CONFIG, ["flush", "append_plain"])):
        lowered = stages(MODEL, config)["lower"]
        prefill, decode = (
            [name for name in operators(lowered, function) if name in (f"attention_{function}", "append", *second)]
            for function in ("prefill", "decode")
        )
        assert prefill == ["attention_prefill", "append", "attention_prefill", *second]
        assert operators(lowered, "prefill")[-1] == "join"
        assert decode == ["append", "attention_decode", *second, "attention_decode"]


def test_the_library_says_what_is_kept():
    mod = stages(MODEL, CONFIG)["quantize"]
    layers = read_cache_info(mod)["layers"]
    assert [(layer["window"], layer["tokens_kept"]) for layer in layers] == [(WINDOW, 96)] * 2
    whole = read_cache_info(stages(TinyModel(), CONFIG)["quantize"])["layers"]
    assert not any({"window", "tokens_kept"} & layer.keys() for layer in whole)


def test_layers_of_different_windows_have_sizes_of_their_own():
    """One local and one global layer."""

    class Alternating(TinyModel):
        def attend(self, bb, q, k, v):
            local = TinyModel(**vars(self) | {"window": WINDOW if not self.seen else None})
            self.seen.append(q)
            return local.attend(bb, q, k, v)

        seen = []  # noqa: RUF012

    mod = stages(Alternating(), KVCacheConfig.parse("hurwitz3"))["lower"]
    sizes = [str(p.ty.shape[2]) for p in mod["decode"].params[1:3]]
    assert sizes == [f"tiles_straight_window{WINDOW}", "tiles_straight"]
    appends = [g.name_hint for g in mod.get_global_vars() if g.name_hint.startswith("kv_append")]
    assert len(appends) == 3  # into a ring, the same after an attention, and into a whole cache
