"""GPT-2 as onnxruntime's optimizer for transformers leaves it: Attention, SkipLayerNormalization and FastGelu."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from .onnx_cases import Graph


def gpt2_graph(model: torch.nn.Module, unidirectional: bool = True) -> onnx.ModelProto:
    """The decoder of a GPT-2 of transformers; a layer's keys and values are one tensor [2, batch, heads, length, d]."""
    graph, config = Graph(), model.config
    heads, layers = config.n_head, model.transformer
    for name, axes in (
        ("input_ids", ["batch", "seq"]),
        ("position_ids", ["batch", "seq"]),
        ("attention_mask", ["batch", "past + seq"]),
    ):
        dtype = np.int32 if "mask" in name else np.int64
        graph.input(name, np.zeros((1, 1), dtype), axes)
    embedded = [
        graph.node("Gather", [weight(graph, table.weight), name])
        for table, name in ((layers.wte, "input_ids"), (layers.wpe, "position_ids"))
    ]
    total = graph.node("Add", embedded)
    normed = graph.node("LayerNormalization", [total, *both(graph, layers.h[0].ln_1)], epsilon=layers.h[0].ln_1.eps)
    for index, layer in enumerate(layers.h):
        cache = [2, "batch", heads, "past", config.n_embd // heads]
        past = graph.input(f"past_{index}", np.zeros((1,) * 5, np.float32), cache)
        attention = layer.attn
        attended, present = graph.contrib(
            "Attention",
            [normed, *both(graph, attention.c_attn), "attention_mask", past],
            [f"attended_{index}", f"present_{index}"],
            num_heads=heads,
            unidirectional=int(unidirectional),
        )
        cache = [2, "batch", heads, "past + seq", config.n_embd // heads]
        graph.output(present, np.float32, cache)
        normed, total = skip_norm(graph, attention.c_proj, attended, total, layer.ln_2)
        wide = graph.node("MatMul", [normed, weight(graph, layer.mlp.c_fc.weight)])
        wide = graph.contrib("FastGelu", [wide, weight(graph, layer.mlp.c_fc.bias)])
        following = [*[each.ln_1 for each in layers.h[1:]], layers.ln_f][index]
        normed, total = skip_norm(graph, layer.mlp.c_proj, wide, total, following)
    graph.output(graph.node("MatMul", [normed, weight(graph, model.lm_head.weight.T)], ["logits"])[0])
    graph.outputs = graph.outputs[-1:] + graph.outputs[:-1]
    return graph.model()


def weight(graph: Graph, tensor: torch.Tensor) -> str:
    """An initializer of a parameter."""
    array = np.ascontiguousarray(tensor.detach().numpy())
    return graph.weight(f"weight_{len(graph.initializers)}", array)


def both(graph: Graph, layer: torch.nn.Module) -> list[str]:
    """Weight and bias of a layer."""
    return [weight(graph, layer.weight), weight(graph, layer.bias)]


def skip_norm(
    graph: Graph, linear: torch.nn.Module, x: str, skip: str, layer: torch.nn.LayerNorm
) -> tuple[str, str]:
    """The norm of x W + b + skip, and that sum; the bias is the norm's operand."""
    product = graph.node("MatMul", [x, weight(graph, linear.weight)])
    count = len(graph.nodes)
    names = [f"normed_{count}", "", "", f"sum_{count}"]
    operands = [product, skip, *both(graph, layer), weight(graph, linear.bias)]
    graph.contrib("SkipLayerNormalization", operands, names, epsilon=layer.eps)
    return names[0], names[3]
