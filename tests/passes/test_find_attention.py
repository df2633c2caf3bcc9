"""FindAttention: canonical sites, and every near miss with its reason."""

from __future__ import annotations

import json

import pytest
import tvm
from rotquant_tvm.passes.find_attention import SITES_ATTR, FindAttention, dataflow_graph, find_attention
from tvm import relax
from tvm.relax import op

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.step_graph import SOFTCAPS

from .tiny_model import HIDDEN, TinyModel


def sites(model: TinyModel):
    return find_attention(model.module()["main"])


def swap(bb, x, axes=(0, 2, 1, 3)):
    return bb.emit(op.permute_dims(x, list(axes)))


def attention(model, bb, q, k, v, **options):
    options = {"scale": model.scale, "causal_mask": "BottomRight"} | options
    return bb.emit(op.nn.attention(q, k, v, **options))


def test_canonical_sites():
    first, second = sites(TinyModel(heads=6, kv_heads=2, head_dim=64, window=9))
    assert (first.index, second.index) == (0, 1) and not first.reason and not second.reason
    assert (first.heads, first.kv_heads, first.head_dim, first.window, first.mask) == (6, 2, 64, 9, "window")
    assert first.scale == pytest.approx(0.3)
    names = [(s.key.past.name, s.value.past.name) for s in (first, second)]
    assert names == [("past_k_0", "past_v_0"), ("past_k_1", "past_v_1")]
    for site in (first, second):
        for tensor in (site.key, site.value):
            assert int(tensor.new.ty.shape[1]) == 2 and tensor.present.ty.ndim == 4


def test_the_default_scale_is_read_from_the_head_dim():
    class Unscaled(TinyModel):
        def attend(self, bb, q, k, v):
            return attention(self, bb, q, swap(bb, k), swap(bb, v), scale=None)

    assert [s.scale for s in sites(Unscaled())] == pytest.approx([32**-0.5] * 2)


def test_softcaps_come_from_the_functions_attribute():
    assert [s.softcap for s in sites(TinyModel())] == [None, None]
    assert [s.softcap for s in sites(TinyModel(softcap=30.0))] == [30.0, 30.0]
    func = TinyModel().module()["main"]
    assert [s.softcap for s in find_attention(func.with_attr(SOFTCAPS, [0.0, 1.5]))] == [None, 1.5]
    for wrong in ([1.0], [1.0, -1.0], [1.0, float("inf")], [0.0, float("nan")]):
        with pytest.raises(ModelError, match="does not fit the model's 2 attentions"):
            find_attention(func.with_attr(SOFTCAPS, wrong))


class AnotherReader(TinyModel):
    """Adds the mean of all keys to the attention's output."""

    def attend(self, bb, q, k, v):
        mean = bb.emit(op.mean(k, axis=[1, 2], keepdims=True))
        return bb.emit(op.add(super().attend(bb, q, k, v), swap(bb, mean)))


class ReaderBehindALayout(TinyModel):
    """The same, but the reader comes after a permutation that attention shares."""

    def attend(self, bb, q, k, v):
        keys, values = swap(bb, k), swap(bb, v)
        mean = bb.emit(op.mean(keys, axis=[1, 2], keepdims=True))
        return bb.emit(op.add(attention(self, bb, q, keys, values), mean))


class WrongOrder(TinyModel):
    """New tokens before the past."""

    def join(self, bb, past, new):
        return bb.emit(op.concat([new, past], axis=2))


class OtherLayout(TinyModel):
    """A cache [batch, sequence, heads, dim]."""

    def past_shape(self, batch, past):
        return [batch, past, self.kv_heads, self.head_dim]

    def join(self, bb, past, new):
        return bb.emit(op.concat([past, swap(bb, new)], axis=1))

    def attend(self, bb, q, k, v):
        return attention(self, bb, q, k, v)


class ThreeParts(TinyModel):
    def join(self, bb, past, new):
        return bb.emit(op.concat([past, new, new], axis=2))


class NegativeAxis(TinyModel):
    """Spelled otherwise, but canonical."""

    def join(self, bb, past, new):
        return bb.emit(op.concat([past, new], axis=-2))


class NoCache(TinyModel):
    """The past is returned as it came and attention sees the new tokens only."""

    def join(self, bb, past, new):
        return new


class Repeated(TinyModel):
    """Grouped heads spelled as repeated keys and values."""

    def attend(self, bb, q, k, v):
        group = self.heads // self.kv_heads
        k, v = (bb.emit(op.repeat(swap(bb, x), group, axis=2)) for x in (k, v))
        return attention(self, bb, q, k, v)


class Reshaped(TinyModel):
    """Heads and sequence exchanged without moving the data: another model, not to be taken for this one."""

    def attend(self, bb, q, k, v):
        k, v = (bb.emit(op.reshape(x, [x.ty.shape[0], x.ty.shape[2], self.kv_heads, self.head_dim])) for x in (k, v))
        return attention(self, bb, q, k, v)


class NotCausal(TinyModel):
    def attend(self, bb, q, k, v):
        return attention(self, bb, q, swap(bb, k), swap(bb, v), causal_mask=None)


class TopLeft(TinyModel):
    def attend(self, bb, q, k, v):
        return attention(self, bb, q, swap(bb, k), swap(bb, v), causal_mask="TopLeft")


class MaskOperand(TinyModel):
    """A mask that nothing proves to be causal."""

    def attend(self, bb, q, k, v):
        batch, seq = q.ty.shape.values[:2]
        mask = bb.emit(op.zeros(relax.ShapeExpr([batch, self.heads, seq, k.ty.shape[2]]), "float32"))
        return bb.emit(op.nn.attention(q, swap(bb, k), swap(bb, v), bias=mask, scale=self.scale))


class OneQuery(TinyModel):
    """A single query for several new tokens."""

    def attend(self, bb, q, k, v):
        one = bb.emit(op.mean(q, axis=[1], keepdims=True))
        out = attention(self, bb, one, swap(bb, k), swap(bb, v))
        return bb.emit(op.broadcast_to(out, q.ty.shape))


NEAR_MISSES = {
    AnotherReader: "its key cache has another reader: relax.mean",
    ReaderBehindALayout: "its key cache has another reader: relax.mean",
    WrongOrder: "its key is concatenated, but not as (past parameter, new tokens)",
    ThreeParts: "its key is concatenated, but not as (past parameter, new tokens)",
    OtherLayout: "its key cache is joined along axis 1 of a rank 4 tensor, not along [b, h, *s*, d]",
    NoCache: "its key has no cache: it comes from matmul, not from a past joined with new tokens",
    Repeated: "its key heads are repeated before attention",
    Reshaped: "its key cache reaches attention through reshape, not through one permute_dims [0, 2, 1, 3]",
    NotCausal: "it is not causal",
    TopLeft: "it is not causal",
    MaskOperand: "its mask is an operand that is not proven to be causal",
    OneQuery: "it has 1 queries for seq new tokens",
}


@pytest.mark.parametrize("model", NEAR_MISSES, ids=lambda model: model.__name__)
def test_near_misses_say_why(model):
    found = sites(model())
    assert [site.reason for site in found] == [NEAR_MISSES[model]] * 2
    assert {site.describe()["verdict"] for site in found} == {"refuse"}


def test_masks_are_told_apart():
    masks = {model: sites(model())[0].mask for model in (TinyModel, NotCausal, MaskOperand)}
    assert masks == {TinyModel: "causal", NotCausal: "none", MaskOperand: "operand"}


def test_values_of_another_head_dim():
    """As in attention whose values are compressed."""
    n = tvm.tirx.Var("past", "int64")
    parts = {"q": [1, 2, 4, 32], "past_k": [1, 4, n, 32], "k": [1, 4, 2, 32]}
    parts |= {"past_v": [1, 4, n, 16], "v": [1, 4, 2, 16]}
    q, *tensors = (relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in parts.items())
    bb = relax.BlockBuilder()
    with bb.function("main", [q, *tensors]):
        with bb.dataflow():
            joined = [bb.emit(op.concat(tensors[i : i + 2], axis=2)) for i in (0, 2)]
            out = attention(TinyModel(), bb, q, *(swap(bb, x) for x in joined))
            result = bb.emit_output(relax.Tuple([out, *joined]))
        bb.emit_func_output(result)
    (site,) = find_attention(bb.finalize()["main"])
    assert site.reason == "it has values of head_dim 16 and queries of 32"


def test_attention_without_a_cache():
    x = relax.Var("x", relax.TensorType([1, 4, 2, 32], "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(attention(TinyModel(), bb, x, x, x))
        bb.emit_func_output(out)
    (site,) = find_attention(bb.finalize()["main"])
    assert site.reason == "its key has no cache: it comes from a parameter, not from a past joined with new tokens"
    assert site.key is None and not site.describe()["cached"]


def test_another_spelling_of_the_axis_is_canonical():
    assert [site.reason for site in sites(NegativeAxis())] == ["", ""]


def test_the_graph_has_an_edge_for_every_use():
    func = TinyModel(layers=1).module()["main"]
    graph = dataflow_graph(func)
    past = next(p for p in func.params if p.name == "past_k_0")
    (present,) = graph.successors(past)
    assert graph.nodes[present]["value"].op.name == "relax.concat" and graph.nodes[past]["value"] is None
    assert len(list(graph.predecessors(present))) == 2


def test_the_pass_annotates_and_changes_nothing_else():
    mod = TinyModel().module()
    found = tvm.transform.Sequential([FindAttention(), FindAttention()])(mod)
    described = json.loads(found["main"].attrs[SITES_ATTR])
    assert [site["verdict"] for site in described] == ["quantize"] * 2
    assert described[1] | {"variable": ""} == {
        "index": 1,
        "variable": "",
        "operator": "relax.nn.attention",
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 32,
        "scale": pytest.approx(0.3),
        "mask": "causal",
        "window": None,
        "softcap": None,
        "cached": True,
        "verdict": "quantize",
        "reason": "",
    }
    stripped = tvm.IRModule({"main": found["main"].without_attr(SITES_ATTR)})
    tvm.ir.assert_structural_equal(stripped["main"], mod["main"])
    relax.analysis.well_formed(found)


def test_functions_without_attention_have_no_sites():
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([2, HIDDEN], "float32"))
    with bb.function("main", [x]):
        bb.emit_func_output(bb.emit(op.add(x, x)))
    assert json.loads(FindAttention()(bb.finalize())["main"].attrs[SITES_ATTR]) == []
