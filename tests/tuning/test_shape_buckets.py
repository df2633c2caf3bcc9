"""Buckets: every symbolic size gets a number, and nearness is measured in doublings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm import ops
from rotquant_tvm.benchmark.settings import BatchShape
from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.ops.site_shape import SiteShape
from rotquant_tvm.tuning.arguments import RESULTS
from rotquant_tvm.tuning.kernel_shape import KernelShape
from rotquant_tvm.tuning.shape_buckets import (
    WantedSizes,
    bucket_distance,
    bucket_label,
    default_buckets,
    shapes_in,
    size_names,
)

SIZES = st.fixed_dictionaries({"batch": st.integers(1, 64), "tiles": st.integers(1, 4096)})


@pytest.mark.parametrize("kv_cache", ["hurwitz3", "rq3", "f16", "hurwitz2,sinks=4"])
@pytest.mark.parametrize("kind", ["llvm", "cuda"])
def test_every_operator_of_a_model_has_buckets_that_name_all_of_its_sizes(definitions, kv_cache, kind):
    for operator, func in definitions(kv_cache).items():
        if operator not in RESULTS:
            continue
        buckets = default_buckets(KernelShape.of(func), size_names(func), kind)
        assert buckets, operator
        for bucket in buckets:
            assert set(bucket) == set(size_names(func))
            for _, _, shape in shapes_in(func, bucket):
                assert all(size > 0 for size in shape)


def test_sizes_computed_from_others_are_computed(definitions):
    """Centres are one per block of 64 tokens."""
    func = definitions("rq3")["attention_decode"]
    shape = KernelShape.of(func)
    for bucket in default_buckets(shape, size_names(func), "llvm", [BatchShape(3, 1000)]):
        assert bucket == {"batch": 3, "tiles": 32, "blocks": 16}
    shapes = {name: shape for name, _, shape in shapes_in(func, bucket)}
    assert shapes["cache"][:3] == (3, 2, 32) and shapes["centre"][:3] == (3, 2, 16) and shapes["q"] == (3, 1, 4, 64)


def test_an_append_of_single_tokens_is_measured_with_these_alone():
    """The one that rotates its rows; what is known of the other, which copies them, says nothing of it."""
    policy, quartets = CachePolicy(sinks=4, recent=8, center=64), ((4, 1),)
    site = SiteShape("iso3", "iso3", 4, 2, 64, 1.0, None, "float16", policy=policy.name)
    plain, rotating = (
        site.attach(ops.append_plain(2, 64, 100, "float16", policy, ops.Axes("cuda"), rotations=rotations))
        for rotations in (None, (quartets, quartets))
    )
    copies, rotates = KernelShape.of(plain), KernelShape.of(rotating)
    assert len(default_buckets(copies, size_names(plain), "cuda")) == 2
    assert default_buckets(rotates, size_names(rotating), "cuda") == [{"batch": 1, "tiles": 4}]
    assert copies.distance(rotates) is None and copies.label != rotates.label


def test_shapes_that_are_asked_for_replace_the_usual_ones(definitions):
    found = {name: (KernelShape.of(f), size_names(f)) for name, f in definitions().items()}
    asked = [BatchShape(2, 100), BatchShape(2, 200)]
    assert default_buckets(*found["attention_decode"], "cuda", asked) == [
        {"batch": 2, "tiles": 4},
        {"batch": 2, "tiles": 7},
    ]
    assert [b["seq"] for b in default_buckets(*found["attention_prefill"], "cuda", asked)] == [100, 200]
    # an append is of single tokens then, once per batch
    assert [(b["batch"], b["seq"]) for b in default_buckets(*found["append"], "cuda", asked)] == [(2, 1)]


def test_sizes_that_nothing_is_known_of_have_no_buckets(definitions):
    shape = KernelShape.of(definitions()["attention_decode"])
    assert default_buckets(shape, ("batch", "pages"), "cuda") == []
    assert default_buckets(KernelShape("join", {}), ("logits_0",), "cuda") == []


@given(one=SIZES, other=SIZES)
def test_distance_counts_doublings(one, other):
    assert bucket_distance(one, one) == 0
    assert bucket_distance(one, other) == pytest.approx(bucket_distance(other, one))
    doubled = one | {"batch": 2 * one["batch"]}
    assert bucket_distance(doubled, one) == pytest.approx(1)


def test_sizes_that_are_not_known_do_not_count():
    bucket = {"batch": 8, "tiles": 256, "blocks": 4}
    assert bucket_distance(bucket, WantedSizes(8, 8192).sizes()) == 0
    assert bucket_distance(bucket, WantedSizes(tokens=8192).sizes()) == 3  # an open batch counts as 1
    assert bucket_distance({"queries": 5}, WantedSizes(1, 32).sizes()) == 0


@pytest.mark.parametrize(
    ("bucket", "label"),
    [
        ({"batch": 8, "tiles": 1024}, "8x32K"),
        ({"batch": 1, "tiles": 130, "seq": 4096, "blocks": 65}, "1x4160 +4K"),
        ({"n0": 1, "n1": 1, "n2": 1 << 20}, "n=1M"),
        ({"n": 100}, "n=100"),
    ],
)
def test_labels(bucket, label):
    assert bucket_label(bucket) == label
