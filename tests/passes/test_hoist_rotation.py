"""HoistRotation: queries and outputs are rotated instead of cached keys and values; numbers stay."""

from __future__ import annotations

import pytest
import tvm
from rotquant_tvm.passes.hoist_rotation import HoistRotation
from rotquant_tvm.passes.kv_kernels import kernel_of
from tvm import relax

from rotquant_tvm.kv_cache_config import KVCacheConfig

from ..sampling import sampled
from .cached_step import CASES, check_case, operators, stages
from .tiny_model import TinyModel

MODEL = TinyModel(layers=1)


def rotated_operands(mod: tvm.IRModule, name: str) -> list[str]:
    """What each rotate reads: the operator that made it, or what Relax calls it."""
    bindings = relax.analysis.get_var2val(mod[name])
    found = []
    for value in bindings.values():
        kernel = kernel_of(mod, value)
        if kernel is None or kernel[0] != "rotate":
            continue
        source = bindings[value.args[1][0]]
        if isinstance(source, relax.TupleGetItem):
            source = bindings[source.tuple_value]
        made_by = kernel_of(mod, source)
        found.append(made_by[0] if made_by else source.op.name.removeprefix("relax."))
    return found


ALL = ["reshape", "permute_dims", "permute_dims", "attention_dense"]  # queries, the chunk's keys and values, outputs


@pytest.mark.parametrize(
    ("formats", "prefill", "decode"),
    [
        ("hurwitz3", ALL, ["reshape", "attention_dense"]),
        ("iso3/planar2", ALL, ["reshape", "attention_dense"]),
        ("iso3/f16", ["reshape", "permute_dims"], ["reshape"]),
        ("q8_0/turbo4", ["permute_dims", "attention_dense"], ["attention_dense"]),
    ],
)
def test_only_queries_new_tokens_and_outputs_are_rotated(formats, prefill, decode):
    """Before, every cached key and value of a rotated format was un-rotated."""
    made = stages(MODEL, KVCacheConfig.parse(formats))
    cached = sum(f not in ("f16", "q8_0") for f in (formats.split("/") * 2)[:2])
    for name, expected in (("prefill", prefill), ("decode", decode)):
        assert rotated_operands(made["quantize"], name) == ["dequantize_cache"] * cached
        assert sorted(rotated_operands(made["hoist"], name)) == sorted(expected)


def test_nothing_to_hoist_changes_nothing():
    made = stages(MODEL, KVCacheConfig.parse("f16/q8_0"))
    for name in ("prefill", "decode"):
        tvm.ir.assert_structural_equal(made["hoist"][name], made["quantize"][name], map_free_vars=True)


def test_hoisting_twice_is_hoisting_once():
    hoisted = stages(MODEL, KVCacheConfig.parse("iso3/f16"))["hoist"]
    again = HoistRotation()(hoisted)
    for name in ("prefill", "decode"):
        tvm.ir.assert_structural_equal(again[name], hoisted[name], map_free_vars=True)
    relax.analysis.well_formed(again)


def test_the_order_of_operators():
    made = stages(TinyModel(), KVCacheConfig.parse("hurwitz3"))["hoist"]
    layer = ["append", "dequantize_cache", "rotate", "attention_dense", "rotate"]
    assert operators(made, "decode") == ["advance", *layer, *layer]


@pytest.mark.parametrize("case", sampled(CASES, ["plain"]))
def test_numbers_stay(case):
    check_case(case, "quantize", "hoist")
