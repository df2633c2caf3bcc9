"""A decoder with and without a past in one file, as optimum merges them: one If on ``use_cache_branch``."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from transformers.cache_utils import DynamicCache

LAYERS = 2
NAMES = [f"past_key_values.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
OUTPUTS = ["logits", *(name.replace("past_key_values", "present") for name in NAMES)]


class _Step(torch.nn.Module):
    """A model's step; positions follow from the mask, as optimum has them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, *pasts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of every token and the presents."""
        cache = DynamicCache()
        for layer in range(len(pasts) // 2):
            cache.update(*pasts[2 * layer : 2 * layer + 2], layer)
        positions = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :]
        output = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        return (output.logits, *(x for layer in output.past_key_values.layers for x in (layer.keys, layer.values)))


def export(model: torch.nn.Module, path: Path, with_past: bool) -> onnx.ModelProto:
    """A step by torch's exporter of traces, which optimum used for these files."""
    config, past = model.config, 5 * with_past
    head_dim = model.model.layers[0].self_attn.head_dim
    pasts = [torch.zeros(2, config.num_key_value_heads, past, head_dim) for _ in NAMES] if with_past else []
    inputs = (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3 + past, dtype=torch.long), *pasts)
    total = "past_sequence_length + sequence_length" if with_past else "sequence_length"
    axes = {"input_ids": {0: "batch_size", 1: "sequence_length"}, "attention_mask": {0: "batch_size", 1: total}}
    axes |= {name: {0: "batch_size", 2: "past_sequence_length"} for name in NAMES[: len(pasts)]}
    axes |= {name: {0: "batch_size", 2: total} for name in OUTPUTS[1:]} | {"logits": axes["input_ids"]}
    model.config._attn_implementation = "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Step(model).eval(),
            inputs,
            path,
            input_names=["input_ids", "attention_mask", *NAMES[: len(pasts)]],
            output_names=OUTPUTS,
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    return onnx.load(path)


def merged(with_past: onnx.ModelProto, without: onnx.ModelProto) -> onnx.ModelProto:
    """The two in one graph; weights that both have are the outer graph's."""
    weights = {tensor.name: tensor for tensor in with_past.graph.initializer}
    shared = [name for tensor in without.graph.initializer if (name := tensor.name) in weights]
    shared = [name for name in shared if name.startswith("model.")]
    branches = []
    for name, part in (("with_past", with_past), ("without_past", without)):
        own = [tensor for tensor in part.graph.initializer if tensor.name not in shared]
        branches.append(helper.make_graph(part.graph.node, name, [], part.graph.output, initializer=own))
    switch = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    node = helper.make_node(
        "If", ["use_cache_branch"], OUTPUTS, name="optimum::if", then_branch=branches[0], else_branch=branches[1]
    )
    outer = helper.make_graph(
        [node],
        "merged",
        [*with_past.graph.input, switch],
        list(with_past.graph.output),
        initializer=[weights[name] for name in shared],
    )
    return helper.make_model(outer, opset_imports=with_past.opset_import, ir_version=with_past.ir_version)
