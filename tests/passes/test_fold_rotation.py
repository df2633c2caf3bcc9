"""FoldRotation: weights take rotations over; logits stay, codes stay but at boundaries, the original weights stay."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import tvm
from rotquant_tvm.passes.fold_rotation import FoldRotation, folded_rotations
from rotquant_tvm.passes.hoist_rotation import HoistRotation
from rotquant_tvm.passes.lower_kv_ops import LowerKVOps
from rotquant_tvm.passes.quantize_kv_cache import QuantizeKVCache, read_cache_info
from rotquant_tvm.passes.weight_recipes import make_weights
from tvm import relax

from rotquant_tvm.kv_cache_config import KVCacheConfig

from ..sampling import sampled
from .cached_step import CachedStep, check_replay, operators
from .fold_models import GPT2, INTERLEAVED, LLAMA, FoldModel
from .tiny_model import TinyModel

POLICY = "hurwitz3/iso4,sinks=3,recent=2,center=32"
BOTH = ["W_q", "W_k", "W_v", "W_o"]


@cache
def hoisted(model: TinyModel, formats: str) -> tvm.IRModule:
    """The module that the pass is given."""
    with tvm.target.Target("llvm"):
        return HoistRotation()(QuantizeKVCache(KVCacheConfig.parse(formats))(model.module()))


@cache
def folded(model: TinyModel, formats: str) -> tvm.IRModule:
    with tvm.target.Target("llvm"):
        return FoldRotation()(hoisted(model, formats))


def said(model: TinyModel, formats: str) -> dict[str, str]:
    """What the pass says of the first layer: the weights of a role, or why there are none."""
    layer = folded_rotations(folded(model, formats)["decode"])[0]
    return {role: "+".join(entry["weights"]) or entry["reason"] for role, entry in layer.items()}


def roles(q: str, k: str, v: str, out: str) -> dict[str, str]:
    return {"q": q, "k": k, "v": v, "out": out}


BIASED = roles("W_q+b_q", "W_k+b_k", "W_v+b_v", "W_o")
V_ALONE = roles("RoPE", "RoPE", "W_v", "W_o")


@pytest.mark.parametrize(
    ("model", "formats", "expected"),
    [
        (TinyModel(layers=1), "dense3", roles(*BOTH)),
        (GPT2, "hurwitz3", BIASED),
        (GPT2, POLICY, BIASED),
        (LLAMA, POLICY, V_ALONE),
        (LLAMA, "planar3", V_ALONE),
        (FoldModel(rotary="half-split", rotary_dims=8), "planar3", V_ALONE),
        (INTERLEAVED, "planar3", roles(*BOTH)),
        (INTERLEAVED, "iso3", V_ALONE),
        (FoldModel(norm=True), "hurwitz3", roles("QK-norm", "QK-norm", "W_v", "W_o")),
        (FoldModel(norm=True, rotary="interleaved"), "planar3", roles("QK-norm", "QK-norm", "W_v", "W_o")),
        (FoldModel(gate=True), "iso3", roles(*BOTH[:3], "a gate (an elementwise product) lies between")),
        (LLAMA, "f16/iso3", roles("no rotation", "no rotation", "W_v", "W_o")),
        (LLAMA, "hurwitz3/q8_0", roles("RoPE", "RoPE", "no rotation", "no rotation")),
    ],
)
def test_what_is_folded_and_why_not(model, formats, expected):
    assert said(model, formats) == expected


def test_keys_that_are_the_values_too_are_not_folded():
    for formats in ("iso3", POLICY):
        shared = said(FoldModel(shared=True), formats)
        assert shared["k"] == shared["v"] == "what the linear layer makes has another reader"
        assert (shared["q"], shared["out"]) == ("W_q", "W_o")


def test_one_tensor_as_keys_and_values_is_not_folded():
    class OneTensor(TinyModel):
        def join(self, bb, past, new):
            self.__dict__.setdefault("first", []).append(new)
            return super().join(bb, past, self.first[len(self.first) - 1 & ~1])

    assert said(OneTensor(layers=1), "iso3")["v"] == "K and V are one tensor"
    assert said(OneTensor(layers=1), "iso3")["k"] == "K and V are one tensor"


def test_a_value_with_another_reader_is_not_folded():
    for formats in ("iso3", POLICY):
        assert said(FoldModel(reread=True), formats) == roles("W_q", "W_k", "it has another reader", "W_o")


def test_a_weight_with_another_reader_is_not_folded():
    """Two layers that share their weights would need them rotated twice."""

    class Shared(TinyModel):
        def _body(self, bb, inputs, pasts, weights):
            return super()._body(bb, inputs, pasts, [*weights[:6], *weights[2:6], weights[-1]])

    func = folded(Shared(), "iso3")["decode"]
    reasons = {entry["reason"] for layer in folded_rotations(func) for entry in layer.values()}
    assert reasons == {"its weight has another reader"}
    tvm.ir.assert_structural_equal(func.body, hoisted(Shared(), "iso3")["decode"].body, map_free_vars=True)


def test_a_weight_that_is_computed_is_not_folded():
    """As integer weights are, which are multiplied by their scales first."""

    class Scaled(FoldModel):
        def projected(self, bb, x, weights, positions):
            doubled = iter([bb.emit(op_double(next(weights))) for _ in range(3)])
            return super().projected(bb, x, doubled, positions)

    def op_double(weight):
        return relax.op.multiply(weight, relax.const(2.0, "float32"))

    computed = "its weight is computed from others (packed or quantized)"
    assert said(Scaled(), "iso3") == roles(computed, computed, computed, "W_o")


@pytest.mark.parametrize("formats", ["hurwitz3", POLICY])
def test_no_rotation_is_left_where_all_are_folded(formats):
    for name in ("prefill", "decode"):
        before, after = (operators(made(GPT2, formats), name) for made in (hoisted, folded))
        assert "rotate" in before
        assert after == [operator for operator in before if operator != "rotate"]


def test_what_the_cache_holds_is_described_as_before():
    before, after = (read_cache_info(made(GPT2, POLICY)) for made in (hoisted, folded))
    assert before == after


def test_folding_twice_is_folding_once():
    once = folded(GPT2, POLICY)
    again = FoldRotation()(once)
    for name in ("prefill", "decode"):
        tvm.ir.assert_structural_equal(again[name], once[name])


CASES = {
    "gpt2": (GPT2, POLICY),
    "gpt2-straight": (GPT2, "hurwitz2/turbo3"),
    "llama": (LLAMA, POLICY),
    "llama-straight": (LLAMA, "hurwitz3"),
    "interleaved": (INTERLEAVED, "planar3"),
    "interleaved-policy": (INTERLEAVED, "planar3:ip/rotor2,sinks=1,recent=5"),
    "window": (TinyModel(window=29), "iso3/turbo2,sinks=1,recent=5"),
    "window-straight": (TinyModel(window=11), "dense2/hurwitz3:mse"),
    "partial-half": (FoldModel(rotary="half-split", rotary_dims=8), "planar3/hurwitz4,recent=8"),
    "gate": (FoldModel(gate=True), "iso3"),
    "norm": (FoldModel(norm=True, rotary="half-split"), "rotor3/iso3-full"),
}


@pytest.mark.parametrize("case", sampled(CASES, ["gpt2"]))
def test_numbers_stay(case):
    """The same logits, and the same codes but for values at a boundary."""
    model, formats = CASES[case]
    with tvm.target.Target("llvm"):
        before, after = (CachedStep(model, LowerKVOps()(made(model, formats))) for made in (hoisted, folded))
    calls = before.conversation
    after.weights = [tvm.runtime.tensor(w) for w in make_weights(folded(model, formats)["decode"], model.weights)]
    check_replay(calls, after.replay(calls))


def test_weights_take_the_rotation_over_and_the_originals_stay():
    """K and V rows of one packed weight by their own rotations, W_o's columns by that of V, for every query head."""
    model, config = FoldModel(packed=True), KVCacheConfig.parse("hurwitz3/dense3")
    originals = [weight.copy() for weight in model.weights]
    made = list(make_weights(folded(model, "hurwitz3/dense3")["prefill"], model.weights))
    for weight, original in zip(model.weights, originals, strict=True):
        np.testing.assert_array_equal(weight, original)
    key, value = (codec.rotation for codec in config.codecs(0, 1, model.head_dim))
    blocks = [key] * (model.heads + model.kv_heads) + [value] * model.kv_heads
    for got, weight in ((made[2], originals[2]), (made[3], originals[3])):
        heads = weight.astype(np.float64).reshape(*weight.shape[:-1], len(blocks), model.head_dim)
        wanted = np.stack([rotation.apply(heads[..., i, :]) for i, rotation in enumerate(blocks)], -2)
        np.testing.assert_allclose(got, wanted.reshape(weight.shape), atol=1e-6)
    heads = originals[4].astype(np.float64).reshape(model.heads, model.head_dim, -1)
    wanted = np.stack([value.apply(head.T).T for head in heads]).reshape(originals[4].shape)
    np.testing.assert_allclose(made[4], wanted, atol=1e-6)
    assert all(made[i] is model.weights[i] for i in (0, 1, 5))
