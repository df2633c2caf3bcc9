"""Decoders as onnxruntime-genai's model builder writes them, from a Llama-like model of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import torch

from .onnx_cases import Graph


@dataclass
class GenAIGraph:
    """A graph under construction for ``model``.

    ``bits``: linear layers are MatMulNBits with blocks of 32, and the model's own weights become what these codes
    stand for. ``packed``: one product gives queries, keys and values. ``capacity``: the past is a buffer of this size,
    shared with the present. ``multi_head``: RotaryEmbedding and MultiHeadAttention in the place of
    GroupQueryAttention, as for models without grouped queries.
    """

    model: torch.nn.Module
    dtype: type = np.float32
    bits: int | None = None
    packed: bool = False
    capacity: int | None = None
    multi_head: bool = False
    graph: Graph = field(default_factory=Graph)

    def onnx_model(self) -> onnx.ModelProto:
        """The whole decoder."""
        graph, config = self.graph, self.model.config
        graph.input("input_ids", np.zeros((1, 1), np.int64), ["batch_size", "sequence_length"])
        graph.input("attention_mask", np.zeros((1, 1), np.int64), ["batch_size", "total_sequence_length"])
        counts = self._counts()
        layers = self.model.model
        x = graph.node("Gather", [self._weight("embed", layers.embed_tokens.weight), "input_ids"])
        skip = None
        for index, layer in enumerate(layers.layers):
            normed, x = self._norm(f"{index}.in", layer.input_layernorm, x, skip)
            attended = self._attention(index, layer.self_attn, normed, counts)
            normed, x = self._norm(f"{index}.post", layer.post_attention_layernorm, attended, x)
            skip, x = self._mlp(index, layer.mlp, normed), x
        normed, _ = self._norm("final", layers.norm, x, skip)
        logits = self._linear("lm_head", self.model.lm_head, normed, "logits")
        graph.output(logits, self.dtype, ["batch_size", "sequence_length", config.vocab_size])
        graph.outputs = graph.outputs[-1:] + graph.outputs[:-1]
        return graph.model()

    def _weight(self, name: str, tensor: torch.Tensor) -> str:
        return self.graph.weight(f"{name}.weight", tensor.detach().float().numpy().astype(self.dtype))

    def _counts(self) -> list[str]:
        """seqlens_k and total_sequence_length of the mask."""
        graph = self.graph
        axes = graph.node("Constant", [], value=onnx.numpy_helper.from_array(np.array([1])))
        one = graph.node("Constant", [], value=onnx.numpy_helper.from_array(np.array(1)))
        sums = graph.node("ReduceSum", ["attention_mask", axes], keepdims=0)
        seqlens = graph.node("Cast", [graph.node("Sub", [sums, one])], to=onnx.TensorProto.INT32)
        length = graph.node("Gather", [graph.node("Shape", ["attention_mask"]), one], axis=0)
        return [seqlens, graph.node("Cast", [length], to=onnx.TensorProto.INT32)]

    def _norm(self, name: str, norm: torch.nn.Module, x: str, skip: str | None) -> tuple[str, str]:
        """The normalized sum of x and skip, and the sum itself."""
        weight, attributes = self._weight(f"{name}.norm", norm.weight), {"epsilon": norm.variance_epsilon}
        if skip is None:
            normed = self.graph.node("SimplifiedLayerNormalization", [x, weight], axis=-1, stash_type=1, **attributes)
            return normed, x
        outputs = [f"{name}.normed", "", "", f"{name}.sum"]
        self.graph.contrib("SkipSimplifiedLayerNormalization", [x, skip, weight], outputs, **attributes)
        return outputs[0], outputs[3]

    def _linear(self, name: str, layer: torch.nn.Linear, x: str, output: str | None = None) -> str:
        outputs = 1 if output is None else [output]
        if self.bits is None:
            weight = self._weight(name, layer.weight.T)
            result = self.graph.node("MatMul", [x, weight], outputs)
        else:
            operands = [x, *self._quantized(name, layer)]
            sizes = {"N": layer.out_features, "K": layer.in_features, "bits": self.bits, "block_size": 32}
            result = self.graph.contrib("MatMulNBits", operands, outputs, accuracy_level=0, **sizes)
        return result if output is None else output

    def _quantized(self, name: str, layer: torch.nn.Linear) -> list[str]:
        """Codes and scales of a layer's weight, which is rounded in place."""
        assert self.bits is not None
        weight = layer.weight.detach().float().numpy()
        blocks = weight.reshape(len(weight), -1, 32)
        middle = 1 << (self.bits - 1)
        scales = (np.abs(blocks).max(-1) / (middle - 1)).astype(self.dtype)
        codes = np.clip(np.rint(blocks / scales[..., None]) + middle, 0, 2 * middle - 1).astype(np.uint8)
        rounded = (codes.astype(np.float32) - middle) * scales[..., None].astype(np.float32)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(rounded.reshape(weight.shape)))
        if self.bits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        return [self.graph.weight(f"{name}.codes", codes), self.graph.weight(f"{name}.scales", scales)]

    def _attention(self, index: int, layer: torch.nn.Module, x: str, counts: list[str]) -> str:
        config, graph = self.model.config, self.graph
        projections = [layer.q_proj, layer.k_proj, layer.v_proj]
        if self.packed:
            whole = torch.nn.Linear(config.hidden_size, sum(p.out_features for p in projections), bias=False)
            with torch.no_grad():
                whole.weight.copy_(torch.cat([p.weight for p in projections]))
            operands = [self._linear(f"{index}.qkv", whole, x), None, None]
            pieces = whole.weight.split([p.out_features for p in projections])
            with torch.no_grad():  # the product's weights may have been rounded
                for part, piece in zip(projections, pieces, strict=True):
                    part.weight.copy_(piece)
        else:
            operands = [self._linear(f"{index}.{n}", p, x) for n, p in zip("qkv", projections, strict=True)]
            operands = [self._by_head(f"{index}.{n}", layer, n, each) for n, each in zip("qkv", operands, strict=True)]
        past = [config.num_key_value_heads, self.capacity or "past_sequence_length", layer.head_dim]
        present = [config.num_key_value_heads, self.capacity or "total_sequence_length", layer.head_dim]
        presents = []
        for kind in ("key", "value"):
            empty = np.zeros((1, 1, 1, 1), self.dtype)
            operands.append(graph.input(f"past_key_values.{index}.{kind}", empty, ["batch_size", *past]))
            presents.append(f"present.{index}.{kind}")
            graph.output(presents[-1], self.dtype, ["batch_size", *present])
        window = getattr(config, "sliding_window", None)
        outputs = [f"attention.{index}", *presents]
        if self.multi_head:
            self._multi_head(operands, outputs)
            return self._linear(f"{index}.o", layer.o_proj, outputs[0])
        attributes = {"num_heads": config.num_attention_heads, "kv_num_heads": config.num_key_value_heads}
        attributes |= {"do_rotary": 1, "local_window_size": window or -1, "scale": float(layer.scaling)}
        graph.contrib("GroupQueryAttention", [*operands, *counts, *self._tables()], outputs, **attributes)
        return self._linear(f"{index}.o", layer.o_proj, outputs[0])

    def _multi_head(self, operands: list[str], outputs: list[str]) -> None:
        """Attention whose queries and keys are rotated before; the mask is of keys, and causality an attribute."""
        graph = self.graph
        q, k, v, *pasts = operands
        if "position_ids" not in graph.inputs:
            graph.input("position_ids", np.zeros((1, 1), np.int64), ["batch_size", "sequence_length"])
            graph.node("Cast", ["attention_mask"], ["key_mask"], to=onnx.TensorProto.INT32)
        tables = ["position_ids", *self._tables()]
        q, k = (graph.contrib("RotaryEmbedding", [x, *tables], interleaved=0) for x in (q, k))
        heads = {"num_heads": self.model.config.num_attention_heads, "unidirectional": 1}
        graph.contrib("MultiHeadAttention", [q, k, v, None, "key_mask", None, *pasts], outputs, **heads)

    def _by_head(self, name: str, layer: torch.nn.Module, which: str, x: str) -> str:
        """Queries or keys with the norm of each head, where the model has one (Qwen3)."""
        if not hasattr(layer, f"{which}_norm"):
            return x
        graph, norm = self.graph, getattr(layer, f"{which}_norm")
        split, joined = (
            graph.node("Constant", [], value=onnx.numpy_helper.from_array(np.array(sizes)))
            for sizes in ([0, 0, -1, layer.head_dim], [0, 0, getattr(layer, f"{which}_proj").out_features])
        )
        operands = [graph.node("Reshape", [x, split]), self._weight(f"{name}.head_norm", norm.weight)]
        attributes = {"axis": -1, "epsilon": norm.variance_epsilon, "stash_type": 1}
        return graph.node("Reshape", [graph.node("SimplifiedLayerNormalization", operands, **attributes), joined])

    def _tables(self) -> list[str]:
        """The cosines and sines of all positions, made once."""
        if not any(tensor.name == "cos_cache" for tensor in self.graph.initializers):
            rotary = self.model.model.rotary_emb
            positions = torch.arange(self.model.config.max_position_embeddings)[None]
            for name, table in zip(("cos_cache", "sin_cache"), rotary(torch.zeros(1), positions), strict=True):
                half = table[0, :, : table.shape[-1] // 2].float().numpy().astype(self.dtype)
                self.graph.weight(name, np.ascontiguousarray(half))
        return ["cos_cache", "sin_cache"]

    def _mlp(self, index: int, mlp: torch.nn.Module, x: str) -> str:
        gate = self._linear(f"{index}.gate", mlp.gate_proj, x)
        up = self._linear(f"{index}.up", mlp.up_proj, x)
        active = self.graph.node("Mul", [gate, self.graph.node("Sigmoid", [gate])])
        return self._linear(f"{index}.down", mlp.down_proj, self.graph.node("Mul", [active, up]))
