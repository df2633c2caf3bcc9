"""QuantizeKVCache: the functions it makes, their numbers and its refusals."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from itertools import chain

import numpy as np
import pytest
import tvm
from rotquant_tvm.passes.find_attention import FindAttention
from rotquant_tvm.passes.quantize_kv_cache import QuantizeKVCache, kept_layers, read_cache_info, with_cache_info
from tvm import relax
from tvm.relax import op

from rotquant_tvm.errors import FormatError, ModelError, UsageError
from rotquant_tvm.formats import parse_pair
from rotquant_tvm.kv_cache_config import KVCacheConfig

from ..sampling import sampled
from .cached_step import CASES, CachedStep, check_numbers, compiled, expected_logits, operators, stages, stored
from .test_find_attention import NEAR_MISSES
from .tiny_model import POSITIONS, VOCAB, TinyModel

MORE_CASES = {
    "f16-per-layer": (TinyModel(kv_heads=4), "f16", "-1=q8_0/bf16"),
    "int64-ids": (TinyModel(layers=1, index_dtype="int64"), "turbo4/f16", None),
}
ALL_CASES = CASES | MORE_CASES
PLAIN = CASES["plain"][0]
PLAIN_CONFIG = KVCacheConfig.parse(*CASES["plain"][1:])


def case(name: str) -> tuple[TinyModel, KVCacheConfig, CachedStep]:
    """A case's model and config, and its compiled form."""
    model, *formats = ALL_CASES[name]
    config = KVCacheConfig.parse(*formats)
    return model, config, compiled(name, "quantize") if name in CASES else _more(name)


@cache
def _more(name: str) -> CachedStep:
    model, *formats = MORE_CASES[name]
    return CachedStep(model, stages(model, KVCacheConfig.parse(*formats))["quantize"])


@pytest.mark.parametrize("name", sampled(ALL_CASES, ["plain", "policy"]))
def test_numbers_are_those_of_the_format(name):
    """Ragged prefill in chunks and decode, over the cache's own keys and values."""
    model, config, step = case(name)
    for call in step.conversation:
        check_numbers(call, expected_logits(model, config, call))
        np.testing.assert_array_equal(call.after[-1], call.before[-1] + call.new)


@pytest.mark.parametrize("name", [name for name in ALL_CASES if "policy" not in name])
def test_the_cache_holds_the_encoded_keys_and_values(name):
    """Codes are NumPy's but for a few at boundaries; tokens that were there keep their bits."""
    model, config, step = case(name)
    for call in step.conversation[:3]:
        before, after = (stored(model, config, c) for c in (call.before, call.after))
        for b, (length, count) in enumerate(zip(call.before[-1], call.new, strict=True)):
            for old, new in zip(chain(*before), chain(*after), strict=True):
                np.testing.assert_array_equal(new[b, :, :length], old[b, :, :length])
            if count:
                pasts, now = (
                    [[x[b, :, part] for x in layer] for layer in after]
                    for part in (slice(0, length), slice(length, length + count))
                )
                check_stored(model, config, call.ids[b, :count], pasts, now, call.decode)


def check_stored(model, config, ids, pasts, now, decode):
    """Compare what the cache holds of one sequence's new tokens with NumPy's round trip of them."""
    _, news = model.forward(ids, pasts, (lambda layer, _: now[layer]) if decode else None)
    for layer, pair in enumerate(news):
        codecs = config.codecs(layer, model.layers, model.head_dim)
        for codec, new, held in zip(codecs, pair, now[layer], strict=True):
            far = np.abs(held - codec.decode(codec.encode(new))) > 2e-3 * np.abs(new).max()
            assert far.mean() < 2e-3


def test_the_library_functions():
    mod = stages(PLAIN, KVCacheConfig.parse("hurwitz3"))["quantize"]
    assert {"kv_cache_info", "create_kv_cache", "prefill", "decode"} <= {g.name_hint for g in mod.get_global_vars()}
    assert "main" not in {g.name_hint for g in mod.get_global_vars()}
    layer = ["append", "dequantize_cache", "rotate", "rotate", "attention_dense"]
    for name in ("prefill", "decode"):
        assert operators(mod, name) == ["advance", *layer, *layer]
    names = [p.name for p in mod["prefill"].params]
    assert names[:5] == ["ids", "new_lengths", "cache_0", "cache_1", "lengths"] and len(names) == 5 + 11
    assert [p.name for p in mod["decode"].params] == [names[0], *names[2:]]
    assert [int(mod[n].attrs["num_input"]) for n in ("prefill", "decode")] == [5, 4]
    assert {str(p.ty.dtype) for p in mod["prefill"].params[2:4]} == {"uint32"}
    assert [int(s) for s in mod["decode"].params[1].ty.shape.values[1::2]] == [2, 2 * (32 * 32 * 3 // 8 + 64) // 4]
    relax.analysis.well_formed(mod)


def test_the_library_functions_with_a_policy():
    """A chunk reads the cache before its tokens enter; a single token enters first. A 16-bit layer has no segments."""
    mod = stages(PLAIN, KVCacheConfig.parse("hurwitz3,sinks=4,center=32", "1=f16"))["quantize"]
    names = [p.name for p in mod["prefill"].params]
    assert names[:8] == ["ids", "new_lengths", "cache_0", "centre_0", "plain_0", "cache_1", "packed", "lengths"]
    past, rotate = ["dequantize_segments", "rotate", "rotate"], ["rotate", "rotate"]
    straight = ["append", "dequantize_cache", "attention_dense"]
    enter = ["flush", "append_plain"]
    assert operators(mod, "prefill") == [
        *("advance", "plan_flush", *rotate, *past, *rotate, "attention_dense", *enter, *straight, "join")
    ]
    assert operators(mod, "decode") == ["advance", "plan_flush", *rotate, *enter, *past, "attention_dense", *straight]
    created = mod["create_kv_cache"].ret_ty.fields
    assert [str(t.dtype) for t in created] == ["uint32", "uint32", "float16", "uint32", "int32", "int32"]


def test_layers_share_their_kernels():
    mod = stages(TinyModel(layers=3), KVCacheConfig.parse("iso3", "1=f16"))["quantize"]
    found = [g.name_hint for g in mod.get_global_vars() if g.name_hint.startswith("kv_append")]
    assert len(found) == 2


def test_sixteen_bit_formats_need_no_rotation():
    mod = stages(TinyModel(layers=1), KVCacheConfig.parse("f16/q8_0"))["quantize"]
    assert operators(mod, "decode") == ["advance", "append", "dequantize_cache", "attention_dense"]


def test_the_cache_is_allocated_at_capacity_and_empty():
    step = compiled("plain", "quantize")
    tiles_words = (2 * (32 * 32 * 3 // 8 + 64) // 4, (32 * 32 + 64 + 32 * 32 * 3 // 8 + 64) // 4)
    for capacity, tiles in [(1, 1), (32, 1), (33, 2), (96, 3)]:
        *layers, lengths = step.create(5, capacity)
        assert [x.shape for x in layers] == [(5, 2, tiles, words) for words in tiles_words]
        assert lengths.shape == (5,)
        assert not any(x.any() for x in (*layers, lengths))


def test_the_caches_memory_is_updated_in_place():
    step = compiled("plain", "quantize")
    cache = [tvm.runtime.tensor(x) for x in step.create(1)]
    pointers = [x.data_ptr() for x in cache]
    ids = tvm.runtime.tensor(np.array([[3]], np.int32))
    for _ in range(2):
        step.vm["decode"](ids, *cache, *step.weights)
    assert cache[-1].numpy().tolist() == [2] and cache[0].numpy().any()
    assert [x.data_ptr() for x in cache] == pointers


def test_positions_of_padding_stay_within_the_model():
    """A row's padding must not index a position table beyond its end, where ids are looked up unchecked."""

    class LargestPosition(TinyModel):
        def logits(self, bb, x, positions, last, weight):
            largest = bb.emit(op.max(bb.emit(op.astype(positions, "float32")), axis=[1], keepdims=True))
            scaled = bb.emit(op.multiply(largest, relax.const(1e4)))
            return bb.emit(op.add(super().logits(bb, x, positions, last, weight), scaled))

    model = LargestPosition(layers=1)
    step = CachedStep(model, stages(model, KVCacheConfig.parse("f16"))["quantize"])
    cache = step.create(3, POSITIONS)
    cache[-1][:] = [POSITIONS - 2, 4, POSITIONS]
    call = step.call(cache, np.ones((3, 40), int), [2, 40, 0])
    assert (call.logits.mean(1) / 1e4).round().tolist() == [POSITIONS - 1, 43, POSITIONS - 1]


def test_what_the_library_says_of_itself():
    model = TinyModel(head_dim=64)
    mod = model.module()
    limited = tvm.IRModule({"main": mod["main"].with_attr("rotquant.max_position", 77)})
    info = read_cache_info(QuantizeKVCache(KVCacheConfig.parse("hurwitz3/q8_0,sinks=4", "0=f16"))(limited))
    half = {"kv_heads": 2, "head_dim": 64, "k": "f16", "v": "f16", "tile_bytes": 32 * 64 * 4}
    assert info["layers"][0] == half
    assert info["layers"][1]["policy"] == {"sinks": 4, "recent": 0, "center": 0, "defer": 0}
    assert info["layers"][1]["k"] == "hurwitz3" and info["layers"][1]["v"] == "q8_0"
    assert info["layers"][1]["tile_bytes"] == 32 * (64 * 11 // 8 + 2 * 3)
    assert (info["version"], info["layout_version"], info["vocab_size"]) == (3, 1, VOCAB)
    assert (info["max_position"], info["dtype"]) == (77, "float32")
    assert info["weights"] == [f"weight_{i:04d}" for i in range(11)]
    step = compiled("plain", "quantize")
    assert json.loads(str(step.vm["kv_cache_info"]()))["layers"][1]["k"] == "q8_0"


def test_the_description_can_be_replaced():
    mod = stages(PLAIN, PLAIN_CONFIG)["quantize"]
    info = read_cache_info(mod) | {"weights": ["one"]}
    assert read_cache_info(with_cache_info(mod, info)) == info and read_cache_info(mod)["weights"] != ["one"]


@pytest.mark.parametrize("model", NEAR_MISSES, ids=lambda model: model.__name__)
def test_near_misses_are_refused_by_name(model):
    with pytest.raises(ModelError) as error:
        QuantizeKVCache(KVCacheConfig.parse("hurwitz3"))(model().module())
    assert str(error.value).startswith("attention 0 (") and str(error.value).endswith(NEAR_MISSES[model])


class ReadsThePast(TinyModel):
    """The logits depend on the past outside attention."""

    def logits(self, bb, x, positions, last, weight):
        past = bb.emit(op.mean(self.seen[0], axis=[1, 2, 3], keepdims=True))
        flat = bb.emit(op.reshape(past, [past.ty.shape[0], 1]))
        return bb.emit(op.add(super().logits(bb, x, positions, last, weight), flat))

    def join(self, bb, past, new):
        self.seen.append(past)
        return super().join(bb, past, new)

    seen = []  # noqa: RUF012


class KeysFromThePast(TinyModel):
    """New keys depend on the cached ones."""

    def join(self, bb, past, new):
        mean = bb.emit(op.mean(past, axis=[2], keepdims=True))
        return super().join(bb, past, bb.emit(op.add(new, mean)))


class CountsThePast(TinyModel):
    """The logits depend on the length of the past, which only the positions may tell."""

    def attend(self, bb, q, k, v):
        out = super().attend(bb, q, k, v)
        total = bb.emit(op.sum(bb.emit(op.full(relax.ShapeExpr([k.ty.shape[2]]), relax.const(1.0), "float32"))))
        return bb.emit(op.multiply(out, total))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ReadsThePast, "the model's logits read a past key or value outside attention"),
        (KeysFromThePast, r"attention 0 \(\w+\): its new tokens read the past"),
        (CountsThePast, "the model uses the past.s length outside attention"),
    ],
)
def test_a_past_that_is_used_otherwise_is_refused(model, message):
    with pytest.raises(ModelError, match=message):
        QuantizeKVCache(KVCacheConfig.parse("hurwitz3"))(model().module())


@pytest.mark.parametrize(
    ("model", "config", "error", "message"),
    [
        (TinyModel(head_dim=96), ("turbo3", None), FormatError, "turbo3 cannot take head_dim 96"),
        (TinyModel(head_dim=24), ("f16", None), FormatError, "f16 cannot take head_dim 24.*no format takes another"),
        (TinyModel(), ("hurwitz3", "2=f16"), UsageError, "layer override 2: the model has layers 0 to 1"),
        (TinyModel(), ("hurwitz3", "-3=f16"), UsageError, "layer override -3: the model has layers 0 to 1"),
    ],
)
def test_formats_that_do_not_fit_are_refused(model, config, error, message):
    with pytest.raises(error, match=message):
        QuantizeKVCache(KVCacheConfig.parse(*config))(model.module())


def test_modules_that_no_importer_made_are_refused():
    config = KVCacheConfig.parse("hurwitz3")
    mod = TinyModel().module()
    with pytest.raises(ModelError, match=r'no Relax function "main"'):
        QuantizeKVCache(config)(tvm.IRModule({"other": mod["main"]}))
    with pytest.raises(ModelError, match="num_input"):
        QuantizeKVCache(config)(tvm.IRModule({"main": mod["main"].without_attr("num_input")}))
    with pytest.raises(ModelError, match="no Relax function"):
        QuantizeKVCache(config)(QuantizeKVCache(config)(mod))
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([2, 2], "float32"))
    with bb.function("main", [x], attrs={"num_input": 1}):
        bb.emit_func_output(bb.emit(op.add(x, x)))
    with pytest.raises(ModelError, match="the model has no attention"):
        QuantizeKVCache(config)(bb.finalize())


def test_it_runs_in_a_sequence_of_passes():
    model, config = PLAIN, PLAIN_CONFIG
    with tvm.target.Target("llvm"):
        mod = tvm.transform.Sequential([FindAttention(), QuantizeKVCache(config)])(model.module())
    tvm.ir.assert_structural_equal(mod["decode"], stages(model, config)["quantize"]["decode"], map_free_vars=True)


def test_an_imported_module_stays_as_it_was():
    model, config = PLAIN, PLAIN_CONFIG
    mod = model.module()
    QuantizeKVCache(config)(mod)
    tvm.ir.assert_structural_equal(mod, model.module())
    assert parse_pair("hurwitz3")[0] == config.formats.k


def test_heads_that_a_format_cannot_take_stay_in_16_bits_if_asked():
    """The keys of the layer alone; its values, and other layers, are quantized."""
    model = TinyModel(head_dim=48)
    config = KVCacheConfig.parse("turbo3/iso3", "1=iso3")
    with pytest.raises(FormatError, match="turbo3 cannot take head_dim 48"):
        QuantizeKVCache(config)(model.module())
    mod = QuantizeKVCache(dataclasses.replace(config, on_unsupported="keep"))(model.module())
    assert [(layer["k"], layer["v"]) for layer in read_cache_info(mod)["layers"]] == [("f16", "iso3"), ("iso3", "iso3")]
    for name in ("prefill", "decode"):
        assert list(kept_layers(mod[name])) == [0] and "head_dim 48" in kept_layers(mod[name])[0]["k"]
    assert kept_layers(QuantizeKVCache(KVCacheConfig.parse("iso3"))(model.module())["decode"]) == {}
