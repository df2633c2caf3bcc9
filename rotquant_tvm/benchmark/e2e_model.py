"""The model of the end-to-end benchmark: the shape of Llama-3.1-8B with random weights, made on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm

from rotquant_tvm.compiler import CompiledModel, compile
from rotquant_tvm.frontend import ImportedModel, from_config
from rotquant_tvm.kv_cache_config import KVCacheConfig

WEIGHT_SCALE = 0.02


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama model; the defaults are those of Llama-3.1-8B."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 14336
    vocabulary: int = 128256
    positions: int = 131072
    rope_theta: float = 500000.0
    epsilon: float = 1e-5

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"Llama shape, {self.layers} layers of {self.hidden}, {self.heads}/{self.kv_heads} heads"

    def config(self) -> Any:
        """The transformers configuration."""
        from transformers import LlamaConfig

        rope = {
            "rope_type": "llama3",
            "rope_theta": self.rope_theta,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.positions,
            rms_norm_eps=self.epsilon,
            tie_word_embeddings=False,
            rope_parameters=rope,
        )


class BenchmarkModel:
    """The imported model and its weights on the device, which all compiled forms of it share.

    ``weights``: torch tensors on the device, by the order in which compiled libraries take them: embedding, then of
    each layer the joined q, k, v, the output, the joined gate and up, the down projection and two norms, then the last
    norm and the head.
    """

    def __init__(self, shape: ModelShape, target: tvm.target.Target) -> None:
        self.shape, self.target = shape, target
        self._imported: ImportedModel = from_config(shape.config())
        self.weights: list[Any] = []

    def compiled(self, kv_cache: str) -> CompiledModel:
        """Compile for one cache; the first one decides the weights' layout, which does not depend on the cache."""
        compiled = compile(self._imported, KVCacheConfig.parse(kv_cache), self.target)
        if not self.weights:
            self.weights = [_random(shape, dtype) for shape, dtype in compiled.weight_types]
        return compiled

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.weights)

    def step_bytes(self, batch: int) -> int:
        """Bytes of weights that one decode step reads: all but the embedding, of which it reads a row per sequence."""
        embedding = self.weights[0]
        size: int = embedding.element_size()
        elements: int = embedding.numel()
        return self.weight_bytes - elements * size + batch * self.shape.hidden * size

    def flops(self, rows: int, last_rows: int) -> float:
        """Operations of the linear layers for ``rows`` tokens, ``last_rows`` of which are asked for logits."""
        matrices = [weight for weight in self.weights[1:] if weight.dim() == 2]
        operations: list[float] = [2.0 * weight.numel() for weight in matrices]
        *layers, head = operations
        return rows * sum(layers) + last_rows * head


def _random(shape: tuple[int, ...], dtype: str) -> Any:
    import torch

    weight = torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")
    return weight.fill_(1.0) if len(shape) == 1 else weight.normal_(0.0, WEIGHT_SCALE)
