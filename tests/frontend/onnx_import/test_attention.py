"""The standard operators Attention, RotaryEmbedding, RMSNormalization and TensorScatter, against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.step_graph import SOFTCAPS

from ...sampling import sampled
from .onnx_cases import Graph, imported, normal
from .step_runner import check

BATCH, SEQ, PAST, HEADS, KV_HEADS, HEAD_DIM = 2, 3, 5, 12, 4, 16
DIMS = {BATCH: "batch", SEQ: "seq", PAST: "past", PAST + SEQ: "past + seq"}


def heads_first(rng, heads, length):
    return normal(rng, BATCH, heads, length, HEAD_DIM)


def flat(x):
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def attention_graph(*, opset=23, three=False, past=True, mask=None, kv_heads=KV_HEADS, outputs=3, **attributes):
    """One Attention with its inputs; ``mask`` is an array, ``three``: operands [batch, seq, width]."""
    rng = np.random.default_rng(3)
    graph = Graph(opset, dims=DIMS)
    arrays = [heads_first(rng, heads, SEQ) for heads in (HEADS, kv_heads, kv_heads)]
    if three:
        arrays = [flat(x) for x in arrays]
        attributes |= {"q_num_heads": HEADS, "kv_num_heads": kv_heads}
    names = [graph.input(name, array) for name, array in zip("qkv", arrays, strict=True)]
    names.append(None if mask is None else graph.input("mask", mask))
    if past:
        names += [graph.input(name, heads_first(rng, kv_heads, PAST)) for name in ("past_k", "past_v")]
    results = graph.node("Attention", names, outputs, **attributes)
    for name in [results] if outputs == 1 else results:
        graph.output(name)
    return graph


def calls(step):
    """The attentions of an import: (operator, causal mask, window)."""
    values = relax.analysis.get_var2val(step.mod["main"]).values()
    attentions = [v for v in values if getattr(getattr(v, "op", None), "name", "").startswith("relax.nn.attention")]
    return [(v.op.name, v.attrs.causal_mask, v.attrs.window_size) for v in attentions]


BOOLEAN = np.tril(np.ones((SEQ, PAST + SEQ), bool), PAST)
FLOAT = np.where(BOOLEAN, 0, -3.4e38).astype(np.float32)[None, None].repeat(BATCH, 0)
RANDOM = np.random.default_rng(0).standard_normal((BATCH, HEADS, SEQ, PAST + SEQ)).astype(np.float32)


CASES = {
    "causal": ({"is_causal": 1}, "relax.nn.attention"),
    "three-axes": ({"is_causal": 1, "three": True, "scale": 0.3}, "relax.nn.attention"),
    "no-past": ({"is_causal": 1, "past": False, "outputs": 1, "kv_heads": HEADS}, "relax.nn.attention"),
    "boolean-mask": ({"mask": BOOLEAN, "three": True}, "relax.nn.attention_bias"),
    "float-mask": ({"mask": FLOAT, "scale": 0.5}, "relax.nn.attention_bias"),
    "mask-and-causal": ({"mask": RANDOM, "is_causal": 1, "opset": 24}, "relax.nn.attention_bias"),
    "mask-and-softcap": ({"mask": RANDOM[:1, :1], "softcap": 1.5}, "relax.nn.attention_bias"),
    "causal-and-softcap": ({"is_causal": 1, "softcap": 0.8, "opset": 24}, "relax.nn.attention"),
    "softmax-precision": ({"is_causal": 1, "softmax_precision": 1}, "relax.nn.attention"),
    "no-mask": ({}, "relax.nn.attention"),
}


@pytest.mark.parametrize("case", sampled(CASES, ["three-axes", "boolean-mask", "mask-and-causal", "mask-and-softcap"]))
def test_attention_is_onnxruntimes(case, tmp_path):
    options, operator = CASES[case]
    step = check(attention_graph(**options), tmp_path)
    ((found, causal, _),) = calls(step)
    assert found == operator
    alone = options.get("is_causal") and options.get("mask") is None
    assert causal == ("BottomRight" if alone else None)
    capped = step.mod["main"].attrs.get(SOFTCAPS)
    assert [float(cap) for cap in capped or ()] == pytest.approx([options["softcap"]] if "softcap" in options else [])


def test_a_cache_of_fixed_length_is_written_and_read_up_to_each_rows_tokens(tmp_path):
    """TensorScatter and nonpad_kv_seqlen: a row's queries are the last of its tokens."""
    rng = np.random.default_rng(4)
    length = 11
    graph = Graph(24, dims={BATCH: "batch", SEQ: "seq"})
    cache = graph.input("cache", normal(rng, BATCH, KV_HEADS, length, HEAD_DIM), ["batch", KV_HEADS, length, HEAD_DIM])
    q, k, v = (
        graph.input(n, heads_first(rng, h, SEQ)) for n, h in zip("qkv", (HEADS, KV_HEADS, KV_HEADS), strict=True)
    )
    start = graph.input("start", np.array([2, 6], np.int64))
    valid = graph.input("valid", np.array([2 + SEQ, 6 + SEQ], np.int64))
    keys, values = (graph.node("TensorScatter", [cache, new, start]) for new in (k, v))
    out = graph.node("Attention", [q, keys, values, None, None, None, valid], is_causal=1)
    for name in (keys, out):
        graph.output(name)
    check(graph, tmp_path)


def test_a_mask_that_names_fewer_keys_hides_the_others(tmp_path):
    graph = attention_graph(mask=np.ones((SEQ, PAST), bool), opset=24)
    graph.inputs["mask"].type.tensor_type.shape.dim[1].dim_param = "past"
    step = imported(graph.model(), tmp_path)
    assert calls(step) == [("relax.nn.attention_bias", None, None)]


def test_a_window_of_opset_25_is_the_attentions_own(tmp_path):
    step = imported(attention_graph(opset=25, is_causal=1, left_window_size=3).model(), tmp_path)
    assert [(name, causal, int(window)) for name, causal, window in calls(step)] == [
        ("relax.nn.attention", "BottomRight", 4)
    ]


def test_heads_that_the_graph_repeats_are_not_repeated(tmp_path):
    """Grouped queries spelled as transformers spells them."""
    rng = np.random.default_rng(5)
    graph = Graph(23, dims=DIMS)
    q, k, v = (
        graph.input(n, heads_first(rng, h, SEQ)) for n, h in zip("qkv", (HEADS, KV_HEADS, KV_HEADS), strict=True)
    )
    axis = graph.weight("axis", np.array([2], np.int64))
    shape = graph.weight("shape", np.array([0, HEADS, SEQ, HEAD_DIM], np.int64))
    wide = graph.weight("wide", np.array([1, 1, HEADS // KV_HEADS, 1, 1], np.int64))
    repeated = [
        graph.node("Reshape", [graph.node("Expand", [graph.node("Unsqueeze", [x, axis]), wide]), shape]) for x in (k, v)
    ]
    graph.inputs["k"].type.tensor_type.shape.dim[2].dim_value = SEQ
    graph.inputs["v"].type.tensor_type.shape.dim[2].dim_value = SEQ
    graph.inputs["q"].type.tensor_type.shape.dim[2].dim_value = SEQ
    graph.output(graph.node("Attention", [q, *repeated], is_causal=1))
    step = check(graph, tmp_path)
    values = relax.analysis.get_var2val(step.mod["main"]).values()
    (call,) = [v for v in values if getattr(getattr(v, "op", None), "name", "") == "relax.nn.attention"]
    assert [int(operand.ty.shape[2]) for operand in call.args] == [HEADS, KV_HEADS, KV_HEADS]


@pytest.mark.parametrize(
    ("attributes", "outputs", "reason"),
    [
        ({"is_causal": 1}, 4, "qk_matmul_output"),
        ({"right_window_size": 2, "opset": 25}, 3, "right_window_size"),
    ],
)
def test_what_attention_cannot_do_is_refused(attributes, outputs, reason, tmp_path):
    with pytest.raises(ModelError, match=reason):
        imported(attention_graph(outputs=outputs, **attributes).model(), tmp_path)


ROTARY = [(interleaved, rotary_dim) for interleaved in (0, 1) for rotary_dim in (0, 8)]


@pytest.mark.parametrize("case", sampled(ROTARY, [(0, 0), (1, 8)]))
def test_rotary_embedding_is_onnxruntimes(case, tmp_path):
    """With three and four axes, with positions and a row per token; the whole head or 8 of its dimensions."""
    interleaved, rotary_dim = case
    rng = np.random.default_rng(6)
    graph = Graph(23, dims={BATCH: "batch", SEQ: "seq"})
    x = graph.input("x", heads_first(rng, HEADS, SEQ))
    wide = graph.input("wide", normal(rng, BATCH, SEQ, HEADS * HEAD_DIM))
    positions = graph.input("position_ids", np.array([[4, 5, 6], [0, 1, 2]], np.int64))
    half = (rotary_dim or HEAD_DIM) // 2
    tables = [graph.weight(f"{name}_table", normal(rng, 16, half)) for name in ("cos", "sin")]
    rows = [graph.input(f"{name}_rows", normal(rng, BATCH, SEQ, half)) for name in ("cos", "sin")]
    attributes = {"interleaved": interleaved, "rotary_embedding_dim": rotary_dim, "num_heads": HEADS}
    graph.output(graph.node("RotaryEmbedding", [x, *tables, positions], **attributes))
    graph.output(graph.node("RotaryEmbedding", [wide, *rows], **attributes))
    step = check(graph, tmp_path)
    assert step.config["max_position"] == 16


def test_norms_are_onnxruntimes(tmp_path):
    rng = np.random.default_rng(7)
    graph = Graph(23, dims={BATCH: "batch"})
    x = graph.input("x", 10 * normal(rng, BATCH, 3, 4, 8))
    for axis, shape in ((-1, (8,)), (2, (4, 8))):
        weight, bias = (graph.weight(f"{name}{axis}", normal(rng, *shape)) for name in ("weight", "bias"))
        graph.output(graph.node("RMSNormalization", [x, weight], axis=axis, epsilon=1e-3))
        graph.output(graph.node("LayerNormalization", [x, weight, bias], axis=axis, epsilon=1e-3))
        graph.output(graph.node("LayerNormalization", [x, weight], axis=axis))
    check(graph, tmp_path)
