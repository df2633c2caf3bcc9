"""Masks that are causal become attributes; those that are nearly so are refused by name and size."""

from __future__ import annotations

import pytest
from tvm import relax

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize import normalize_step

from ...sampling import sampled
from . import mask_spellings as masks
from .numpy_step import compare
from .tiny_step import tiny_graph


def windows(imported):
    values = relax.analysis.get_var2val(imported.mod["main"]).values()
    calls = [v for v in values if isinstance(v, relax.Call) and getattr(v.op, "name", "") == "relax.nn.attention"]
    return [None if call.attrs.window_size is None else int(call.attrs.window_size) for call in calls]


@pytest.mark.parametrize("mask", [masks.causal(), masks.padded, masks.given_bool, masks.given_float])
def test_causal_masks(mask):
    graph = tiny_graph(mask=mask)
    imported = normalize_step(graph)
    assert windows(imported) == [None, None]
    compare(graph, imported)


@pytest.mark.parametrize("size", sampled([1, 2, 3, 7, 40, 300, 4096, 131072], [1, 3, 40, 4096]))
def test_windows_of_any_size(size):
    graph = tiny_graph(mask=masks.window(size), layers=1)
    imported = normalize_step(graph)
    assert windows(imported) == [size]
    compare(graph, imported)


@pytest.mark.parametrize("size", [3, 50])
def test_windows_of_a_model_without_a_cache(size):
    graph = tiny_graph(mask=masks.window(size), layers=1, cache="none", positions="shapes")
    imported = normalize_step(graph)
    assert windows(imported) == [size]
    compare(graph, imported)


def test_the_windows_attribute_is_kept():
    graph = tiny_graph(window=5)
    imported = normalize_step(graph)
    assert windows(imported) == [5, 5]
    compare(graph, imported)


def test_an_input_that_is_the_whole_mask_is_said_to_be_assumed_causal():
    assert normalize_step(tiny_graph(mask=masks.given_bool, layers=1)).config["assumed"] == ["the mask mask is causal"]
    assert normalize_step(tiny_graph(mask=masks.padded, layers=1)).config["assumed"] == []


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (masks.causal(1), "attention 0 .* not causal: token 1 sees token 2"),
        (masks.causal(-1), "not causal: token 0 does not see token 0"),
        (masks.window(3, both=False), "not causal"),
        (masks.padding_alone, "not causal: token 1 sees token 2"),
        (masks.everything, "not causal: token 1 sees token 2"),
        (masks.prefix(4), "not causal: token 1 sees token 2"),
        (masks.blocks(16), "not causal: token 16 does not see token 0"),
        (masks.alibi, r"adds -0.1 to a score .*ALiBi"),
        (masks.of_ids, "computed from the token ids"),
        (masks.later(8, 100), "token 100 does not see token 0"),
        (masks.later(8, 5000), "token 5000 does not see token"),
        (masks.later(8, 5000, bound=True), "token 5000 does not see token"),
    ],
)
def test_other_masks_are_refused(mask, message):
    with pytest.raises(ModelError, match=message):
        normalize_step(tiny_graph(mask=mask, layers=1))


def test_without_a_cache_the_refusal_names_the_way_to_measure():
    with pytest.raises(ModelError, match="simulate"):
        normalize_step(tiny_graph(cache="none", positions="shapes", mask=masks.everything, layers=1))
    with pytest.raises(ModelError, match="none above 4200 can be checked"):
        normalize_step(tiny_graph(cache="none", positions="shapes", mask=masks.window(5000), layers=1))
