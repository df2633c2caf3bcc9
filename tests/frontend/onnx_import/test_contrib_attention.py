"""The attentions of com.microsoft, each form against onnxruntime on random inputs."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm.errors import ModelError

from .onnx_cases import Graph, imported, normal, reference
from .step_runner import StepRunner, check, check_close

BATCH, SEQ, PAST, HEADS, DIM = 2, 3, 5, 4, 32
WIDTH, TOTAL = HEADS * DIM, SEQ + PAST
BIAS = ["batch", HEADS, "seq", "past + seq"]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def sequence(graph: Graph, rng, name: str, *width: int) -> str:
    """An input [batch, seq, …]."""
    return graph.input(name, normal(rng, BATCH, SEQ, *width), ["batch", "seq", *width])


def past(graph: Graph, rng, name: str) -> str:
    """An input [batch, heads, past, head_dim]."""
    return graph.input(name, normal(rng, BATCH, HEADS, PAST, DIM), ["batch", HEADS, "past", DIM])


def masks(graph: Graph) -> dict[str, str]:
    """Masks of every form; every query sees a key in all of them."""
    total = np.array([[1] * TOTAL, [0, 1] + [1] * (TOTAL - 2)], np.int32)
    three = np.tril(np.ones((BATCH, SEQ, TOTAL), np.int32), PAST)
    three[1, :, 2:4] = 0
    return {
        "keys": graph.input("mask_keys", total, ["batch", "past + seq"]),
        "pairs": graph.input("pairs", three, ["batch", "seq", "past + seq"]),
        "counts": graph.input("counts", np.array([TOTAL, TOTAL - 2], np.int32), ["batch"]),
        "limits": graph.input("limits", np.array([TOTAL, TOTAL - 1, 1, 2], np.int32), ["batch*2"]),
    }


def test_multi_head_attention(rng, tmp_path):
    graph = Graph()
    q, k, v = (sequence(graph, rng, name, WIDTH) for name in "qkv")
    wide = sequence(graph, rng, "wide", 2 * WIDTH)
    pasts = [past(graph, rng, name) for name in ("past_k", "past_v")]
    bias = graph.weight("bias", normal(rng, 3 * WIDTH))
    scores = graph.input("scores", normal(rng, 1, HEADS, SEQ, TOTAL), [1, *BIAS[1:]])
    given = masks(graph)
    cases = [
        ([q, k, v, None, None, None, *pasts], {"unidirectional": 1}),
        ([q, k, v, bias, None, None, *pasts], {"unidirectional": 1, "scale": 0.3}),
        ([q, k, v, bias, given["keys"], None, *pasts], {"unidirectional": 1}),
        ([q, k, v, None, given["pairs"], None, *pasts], {}),
        ([q, k, v, None, given["counts"], None, *pasts], {"mask_filter_value": -50.0}),
        ([q, k, v, None, given["keys"], scores, *pasts], {"unidirectional": 1}),
        ([q, k, v, None, None, scores, *pasts], {}),
    ]
    for operands, attributes in cases:
        for name in graph.contrib("MultiHeadAttention", operands, 3, num_heads=HEADS, **attributes):
            graph.output(name)
    graph.output(graph.contrib("MultiHeadAttention", [q, k, wide], num_heads=HEADS, unidirectional=1))
    check(graph, tmp_path)


def test_packed_multi_head_attention(rng, tmp_path):
    """Onnxruntime has no packed form on CPUs: both forms of one attention are compared with each other instead."""
    graph = Graph()
    qkv = sequence(graph, rng, "qkv", HEADS, 3, DIM)
    parts = [graph.feed["qkv"][:, :, :, i].reshape(BATCH, SEQ, WIDTH) for i in range(3)]
    kv = graph.input("kv", graph.feed["qkv"][:, :, :, 1:], ["batch", "seq", HEADS, 2, DIM])
    q, k, v = (graph.input(name, part, ["batch", "seq", WIDTH]) for name, part in zip("qkv", parts, strict=True))
    bias = graph.weight("bias", normal(rng, 3 * WIDTH))
    pasts = [past(graph, rng, name) for name in ("past_k", "past_v")]
    for first in ([q, k, v], [qkv, None, None], [q, kv, None]):
        operands = [*first, bias, None, None, *pasts]
        for name in graph.contrib("MultiHeadAttention", operands, 3, num_heads=HEADS, unidirectional=1):
            graph.output(name)
    results = list(StepRunner(imported(graph.model(), tmp_path))(graph.feed).values())
    for plain, packed, half in zip(results[:3], results[3:6], results[6:], strict=True):
        np.testing.assert_allclose(packed, plain, atol=1e-6)
        np.testing.assert_allclose(half, plain, atol=1e-6)


def test_attention_with_its_projection(rng, tmp_path):
    graph = Graph()
    x = sequence(graph, rng, "x", 24)
    weights, wide = (graph.weight(f"weights{n}", normal(rng, 24, n * WIDTH) / 5) for n in (3, 4))
    bias, wide_bias = (graph.weight(f"bias{n}", normal(rng, n * WIDTH)) for n in (3, 4))
    both = graph.input("past", normal(rng, 2, BATCH, HEADS, PAST, DIM), [2, "batch", HEADS, "past", DIM])
    given = masks(graph)
    for mask, attributes in [
        (None, {"unidirectional": 1}),
        ("keys", {"unidirectional": 1, "scale": 0.2}),
        ("counts", {"unidirectional": 1}),
        ("limits", {"unidirectional": 1}),
        ("pairs", {"mask_filter_value": -100.0}),
    ]:
        operands = [x, weights, bias, given.get(mask), both]
        for name in graph.contrib("Attention", operands, 2, num_heads=HEADS, **attributes):
            graph.output(name)
    scores = graph.input("scores", normal(rng, BATCH, HEADS, SEQ, SEQ), ["batch", HEADS, "seq", "seq"])
    graph.output(graph.contrib("Attention", [x, weights, bias, None, None, scores], num_heads=HEADS))
    sizes = [WIDTH, WIDTH, 2 * WIDTH]
    graph.output(graph.contrib("Attention", [x, wide, wide_bias], num_heads=HEADS, qkv_hidden_sizes=sizes))
    check(graph, tmp_path)


def grouped_feed(rng, batch: int, seq: int, past_length: int, dtype=np.float32) -> dict[str, np.ndarray]:
    """Inputs of grouped attention, 4 heads over 2: separate and packed operands, the same cache for both."""
    sizes = {"q": 4 * DIM, "k": 2 * DIM, "v": 2 * DIM, "qkv": 8 * DIM}
    feed = {name: normal(rng, batch, seq, width, dtype=dtype) for name, width in sizes.items()}
    feed |= {name: normal(rng, batch, 2, past_length, DIM, dtype=dtype) for name in ("past_k", "past_v")}
    return feed | {
        "input_ids": np.zeros((batch, seq), np.int64),
        "seqlens_k": np.full(batch, seq + past_length - 1, np.int32),
        "total": np.array(seq + past_length, np.int32),
        "scores": normal(rng, batch, 1, seq, seq + past_length, dtype=dtype),
        "position_ids": np.broadcast_to(np.arange(seq) + past_length, (batch, seq)).astype(np.int64),
    }


def grouped_graph(feed: dict[str, np.ndarray]) -> Graph:
    """A graph with these inputs; the positions are not among them."""
    graph = Graph()
    for name in ("q", "k", "v", "qkv"):
        graph.input(name, feed[name], ["batch", "seq", feed[name].shape[-1]])
    for name in ("past_k", "past_v"):
        graph.input(name, feed[name], ["batch", 2, "past", DIM])
    graph.input("input_ids", feed["input_ids"], ["batch", "seq"])
    graph.input("seqlens_k", feed["seqlens_k"], ["batch"])
    graph.input("total", feed["total"], [])
    graph.input("scores", feed["scores"], ["batch", 1, "seq", "past + seq"])
    return graph


def test_grouped_query_attention(rng, tmp_path):
    # onnxruntime takes several tokens after a past for one sequence at a time only
    feeds = [grouped_feed(rng, *sizes) for sizes in ((1, 3, 5), (2, 1, 5), (2, 6, 0))]
    graph = grouped_graph(feeds[0])
    angles = rng.uniform(0, 6, (40, DIM // 2)).astype(np.float32)
    full = [graph.weight("cos", np.cos(angles)), graph.weight("sin", np.sin(angles))]
    separate, packed = ["q", "k", "v"], ["qkv", None, None]
    scores = [None, None, None, "scores"]
    for operands, more, attributes in [
        (separate, full, {"do_rotary": 1, "local_window_size": 3}),
        (packed, full, {"do_rotary": 1, "rotary_interleaved": 1}),
        (separate, [], {"scale": 0.2, "softcap": 0.7, "local_window_size": 1}),
        (separate, scores, {"local_window_size": 3}),
        (packed, scores, {}),
    ]:
        operands = [*operands, "past_k", "past_v", "seqlens_k", "total", *more]
        for name in graph.contrib("GroupQueryAttention", operands, 3, num_heads=4, kv_num_heads=2, **attributes):
            graph.output(name)
    step = check(graph, tmp_path, feeds=feeds)
    assert step.inputs[-1] == "position_ids"
    softcaps = [float(cap) for cap in step.mod["main"].attrs["rotquant.softcaps"]]
    np.testing.assert_allclose(softcaps, [0, 0, 0.7, 0, 0], rtol=1e-6)
    assert step.config["max_position"] == 40


def test_grouped_query_attention_without_a_cache_and_in_part_of_a_head(rng, tmp_path):
    feed = grouped_feed(rng, 2, 4, 0)
    graph = grouped_graph(feed)
    angles = rng.uniform(0, 6, (40, DIM // 4)).astype(np.float32)
    tables = [graph.weight("cos", np.cos(angles)), graph.weight("sin", np.sin(angles))]
    positions = graph.input("position_ids", feed["position_ids"], ["batch", "seq"])
    operands = ["q", "k", "v", None, None, "seqlens_k", "total", *tables, positions]
    for name in graph.contrib("GroupQueryAttention", operands, 3, num_heads=4, kv_num_heads=2, do_rotary=1):
        graph.output(name)
    step = check(graph, tmp_path)
    assert step.inputs.count("position_ids") == 1


def test_heads_are_normalized(rng, tmp_path):
    """Onnxruntime has this on GPUs alone: it is compared with norms of its own before an ordinary attention."""
    feed = grouped_feed(rng, 1, 3, 5)
    graph, plain = grouped_graph(feed), grouped_graph(feed)
    weights = [normal(rng, DIM) for _ in range(2)]
    names = [graph.weight(name, weight) for name, weight in zip("ab", weights, strict=True)]
    rest = ["past_k", "past_v", "seqlens_k", "total"]
    heads = {"num_heads": 4, "kv_num_heads": 2}
    operands = ["q", "k", "v", *rest, *[None] * 7, *names]
    graph.output(graph.contrib("GroupQueryAttention", operands, 3, qk_norm_epsilon=1e-3, **heads)[0])
    normed = []
    for name, weight in zip("qk", weights, strict=True):
        split = plain.weight(f"{name}.split", np.array([0, 0, -1, DIM]))
        joined = plain.weight(f"{name}.join", np.array([0, 0, -1]))
        by_head = plain.node("Reshape", [name, split])
        weight = plain.weight(f"{name}.norm", weight)
        by_head = plain.node("SimplifiedLayerNormalization", [by_head, weight], epsilon=1e-3, axis=-1)
        normed.append(plain.node("Reshape", [by_head, joined]))
    plain.output(plain.contrib("GroupQueryAttention", [*normed, "v", *rest], 3, **heads)[0])
    (expected,) = reference(plain.model(), feed).values()
    (result,) = StepRunner(imported(graph.model(), tmp_path))(feed).values()
    check_close("output", result, expected, 1e-4)


COUNTS = {
    "an input": lambda graph: "seqlens_k",
    "sums less one": lambda graph: less(graph, sums(graph, "attention_mask")),
    "sums of a cast mask": lambda graph: less(graph, sums(graph, cast(graph, "attention_mask"))),
    "sums in a column": lambda graph: less(graph, sums(graph, "attention_mask", keepdims=1)),
    "sums and minus one": lambda graph: less(graph, sums(graph, "attention_mask"), "Add", -1),
    "WRONG: not less one": lambda graph: cast(graph, sums(graph, "attention_mask")),
    "WRONG: less two": lambda graph: less(graph, sums(graph, "attention_mask"), "Sub", 2),
    "WRONG: of half a mask": lambda graph: less(graph, sums(graph, halved(graph, "attention_mask"))),
    "WRONG: a whole mask": lambda graph: cast(graph, "attention_mask"),
    "WRONG: sums of ids": lambda graph: less(graph, sums(graph, "input_ids")),
    "WRONG: constant": lambda graph: graph.weight("fixed", np.array([7], np.int32)),
}


def cast(graph: Graph, name: str) -> str:
    return graph.node("Cast", [name], to=6)


def sums(graph: Graph, name: str, keepdims: int = 0) -> str:
    return graph.node("ReduceSum", [name, graph.weight("axes", np.array([1]))], keepdims=keepdims)


def less(graph: Graph, name: str, op_type: str = "Sub", number: int = 1) -> str:
    one = graph.node("Cast", [graph.weight("one", np.array(number))], to=6)
    return graph.node(op_type, [cast(graph, name), one])


def halved(graph: Graph, name: str) -> str:
    ends = [graph.weight(f"end{i}", np.array([i])) for i in (0, 2, 1)]
    return graph.node("Slice", [name, *ends])


@pytest.mark.parametrize("counts", COUNTS)
def test_only_lengths_of_the_whole_cache_are_taken(rng, tmp_path, counts):
    graph = grouped_graph(grouped_feed(rng, 1, 3, 5))
    graph.input("attention_mask", np.ones((1, 8), np.int64), ["batch", "total"])
    operands = ["q", "k", "v", "past_k", "past_v", COUNTS[counts](graph), "total"]
    graph.output(graph.contrib("GroupQueryAttention", operands, 3, num_heads=4, kv_num_heads=2)[0])
    if counts.startswith("WRONG"):
        with pytest.raises(ModelError, match="seqlens_k"):
            imported(graph.model(), tmp_path)
    else:
        imported(graph.model(), tmp_path)


REFUSED = {
    "smooth_softmax": ("GroupQueryAttention", {"smooth_softmax": 1}, 0),
    "head_sink": ("GroupQueryAttention", {}, 11),
    "k_quant_type": ("GroupQueryAttention", {"k_quant_type": "PER_TENSOR"}, 0),
    "k_scale": ("GroupQueryAttention", {}, 12),
    "causal": ("GroupQueryAttention", {"causal": 0}, 0),
    "sliding_window_cache": ("GroupQueryAttention", {"sliding_window_cache": 1, "local_window_size": 4}, 0),
    "cannot share": ("GroupQueryAttention", {"num_heads": 3}, 0),
    "past_sequence_length": ("MultiHeadAttention", {}, 8),
    "cache_indirection": ("MultiHeadAttention", {}, 9),
    "do_rotary": ("Attention", {"do_rotary": 1}, 0),
    "lacks its keys": ("MultiHeadAttention", {}, -1),
    "past values without keys": ("MultiHeadAttention", {}, 7),
    "decoding loop": ("DecoderMaskedMultiHeadAttention", {}, 0),
    "encoders": ("EmbedLayerNormalization", {}, 0),
    "there is no converter": ("SomethingElse", {}, 0),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_refused_by_name(rng, tmp_path, what):
    op_type, attributes, extra = REFUSED[what]
    graph = grouped_graph(grouped_feed(rng, 1, 3, 5))
    operands = ["q", "k", "v", "past_k", "past_v", "seqlens_k", "total"] if op_type[0] == "G" else ["q", "q", "q"]
    operands = operands[:extra] if extra < 0 else operands + [None] * (extra - len(operands)) + ["scores"] * bool(extra)
    heads = {"num_heads": 4} | ({"kv_num_heads": 2} if op_type[0] == "G" else {})
    outputs = graph.contrib(op_type, operands, 3, **heads | attributes)
    graph.output(outputs[0])
    with pytest.raises(ModelError, match=f"model.onnx.*{op_type}.*{what}.*{op_type}_0"):
        imported(graph.model(), tmp_path)
