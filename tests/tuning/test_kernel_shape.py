"""How alike kernels are: 0 for the same code, nothing for kernels whose choices mean nothing to each other."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from rotquant_tvm.schedules.knobs import RECORD_ATTR, with_knobs

from rotquant_tvm.tuning.bare_model import AttentionHeads
from rotquant_tvm.tuning.kernel_shape import KernelShape

HEADS = AttentionHeads(4, 2, 64, "float32")


@pytest.fixture(scope="module")
def shape_of(definitions):
    def of(operator="attention_decode", kv_cache="hurwitz3", **heads):
        return KernelShape.of(definitions(kv_cache, replace(HEADS, **heads))[operator])

    return of


def test_a_choice_is_no_property(definitions):
    func = definitions()["attention_decode"]
    chosen = with_knobs(func, {"splits": 2}).with_attr(RECORD_ATTR, "somewhere")
    assert KernelShape.of(chosen) == KernelShape.of(func)


def test_functions_that_are_no_operators_have_no_shape(definitions):
    func = definitions()["attention_decode"].without_attr("rotquant.op")
    assert KernelShape.of(func) is None


def test_attention_knows_neither_rotation_nor_gain_rule(shape_of):
    """turbo3 and hurwitz3:ip are read by the same code."""
    for kv_cache in ("turbo3", "hurwitz3:ip/planar3", "iso3/hurwitz3:raw"):
        assert shape_of().distance(shape_of(kv_cache=kv_cache)) == 0


def test_distance_is_symmetric_and_zero_only_for_the_same_code(shape_of):
    shapes = [
        shape_of(),
        shape_of(kv_cache="hurwitz4"),
        shape_of(kv_cache="hurwitz3/hurwitz2"),
        shape_of(kv_cache="hurwitz3,sinks=4"),
        shape_of(kv_cache="rq3"),
        shape_of(heads=8),
        shape_of(heads=8, kv_heads=4),
    ]
    for one, other in itertools.combinations(shapes, 2):
        assert one.distance(other) == other.distance(one) > 0
    assert all(shape.distance(shape) == 0 for shape in shapes)


def test_nearer_in_heads_bits_and_segments(shape_of):
    here = shape_of(heads=8, kv_heads=2)
    assert here.distance(shape_of(heads=16, kv_heads=4)) < here.distance(shape_of(heads=32, kv_heads=8))
    # another group of query heads changes the arithmetic, more kv heads only the number of blocks
    assert here.distance(shape_of(heads=16, kv_heads=4)) < here.distance(shape_of(heads=4, kv_heads=2))
    three, four, two = (shape_of(kv_cache=name) for name in ("hurwitz3", "hurwitz4", "hurwitz2"))
    assert three.distance(four) == three.distance(two) < four.distance(two)
    assert three.distance(shape_of(kv_cache="hurwitz3,sinks=4")) < three.distance(shape_of(kv_cache="rq3"))


@pytest.mark.parametrize(
    "other",
    [
        {"kv_cache": "q8_0"},
        {"kv_cache": "hurwitz3+tcq"},
        {"kv_cache": "f16"},
        {"head_dim": 128},
        {"operator": "attention_prefill"},
    ],
)
def test_what_shares_no_code_is_no_neighbour(shape_of, other):
    assert shape_of().distance(shape_of(**other)) is None
    assert shape_of(**other).distance(shape_of()) is None


def test_rotations_are_told_apart_by_their_layers(shape_of):
    assert shape_of("rotate").distance(shape_of("rotate", kv_cache="planar3")) is None
    assert shape_of("rotate").distance(shape_of("rotate", kv_cache="hurwitz4")) == 0


def test_a_record_of_an_unknown_format_is_of_no_use(shape_of):
    other = KernelShape("attention_decode", dict(shape_of().properties) | {"k": "future3"})
    assert shape_of().distance(other) is None and other.distance(other) == 0


def test_a_property_that_older_records_lack_is_off_in_them(shape_of):
    shape = shape_of()
    assert shape.distance(KernelShape(shape.operator, dict(shape.properties) | {"newer": False})) == 0
    assert shape.distance(KernelShape(shape.operator, dict(shape.properties) | {"newer": True})) is None


def test_labels(shape_of):
    assert shape_of(kv_cache="hurwitz3/f16,sinks=4").label == "hurwitz3/f16 4/2x64 float32 sinks=4"


def test_the_flushes_of_a_chunk_and_of_a_step_have_different_labels():
    properties = {"k": "hurwitz3", "v": "hurwitz3", "head_dim": 64, "dtype": "float16", "policy": "recent=8"}
    chunk, step = (KernelShape("flush", properties | {"chunk": chunk}) for chunk in (True, False))
    assert (chunk.label, step.label) == ("hurwitz3 64 float16 recent=8 chunk", "hurwitz3 64 float16 recent=8")
    assert KernelShape("attention_prefill", properties | {"chunk": True}).label == step.label
