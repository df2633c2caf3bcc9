"""The same model in torch, to measure against: layers as in transformers, attention by cuDNN, steps as CUDA graphs."""

from __future__ import annotations

from typing import Any

from .e2e_model import BenchmarkModel


class TorchModel:
    """A decoder over the benchmark's own weights and a 16-bit cache of ``tokens`` per sequence, on CUDA.

    Each layer's three input projections and its gate and up projections are products of their own, as transformers has
    them; norms are torch's fused operator.
    """

    def __init__(self, model: BenchmarkModel, batch: int, tokens: int) -> None:
        import torch
        from torch.nn.attention import SDPBackend

        self.torch, self.shape, self.batch, self.tokens = torch, model.shape, batch, tokens
        self.embedding, *rest = model.weights
        self.layers = [rest[6 * i : 6 * i + 6] for i in range(self.shape.layers)]
        self.norm, self.head = rest[-2:]
        self.backend = SDPBackend.CUDNN_ATTENTION
        size = (self.shape.layers, 2, batch, self.shape.kv_heads, tokens, self.shape.head_dim)
        self.cache = torch.empty(size, dtype=torch.float16, device="cuda").normal_()
        self.rotary = self._rotary_module()

    def _rotary_module(self) -> Any:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        return LlamaRotaryEmbedding(config=self.shape.config()).cuda()

    def decode(self, ids: Any) -> Any:
        """Write the token at the last position of the cache and attend to all of it; logits [batch, vocabulary]."""
        return self._step(ids, self.tokens - 1)

    def prefill(self, ids: Any) -> Any:
        """Tokens [batch, seq] into the empty cache; the logits after the last."""
        return self._step(ids, 0)

    def _step(self, ids: Any, first: int) -> Any:
        torch, f = self.torch, self.torch.nn.functional
        from torch.nn.attention import sdpa_kernel

        with torch.inference_mode(), sdpa_kernel(self.backend):
            hidden = f.embedding(ids, self.embedding)
            positions = torch.arange(first, first + ids.shape[1], device="cuda")[None]
            cos, sin = self.rotary(hidden, positions)
            for number, layer in enumerate(self.layers):
                hidden = self._layer(number, layer, hidden, (cos, sin, first))
            last = f.rms_norm(hidden[:, -1], self.norm.shape, self.norm, self.shape.epsilon)
            return f.linear(last, self.head).float()

    def _layer(self, number: int, layer: list[Any], hidden: Any, place: tuple[Any, Any, int]) -> Any:
        f, shape = self.torch.nn.functional, self.shape
        joined, output, gate_up, down, norm, second_norm = layer
        width, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        x = f.rms_norm(hidden, norm.shape, norm, shape.epsilon)
        q, k, v = (f.linear(x, weight) for weight in joined.split([width, narrow, narrow]))
        hidden = hidden + f.linear(self._attend(number, (q, k, v), place), output)
        x = f.rms_norm(hidden, second_norm.shape, second_norm, shape.epsilon)
        gate, up = (f.linear(x, weight) for weight in gate_up.chunk(2))
        return hidden + f.linear(f.silu(gate) * up, down)

    def _attend(self, number: int, projected: tuple[Any, Any, Any], place: tuple[Any, Any, int]) -> Any:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        cos, sin, first = place
        batch, seq, _ = projected[0].shape
        q, k, v = (x.view(batch, seq, -1, self.shape.head_dim).transpose(1, 2) for x in projected)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        keys, values = self.cache[number]
        keys[:, :, first : first + seq], values[:, :, first : first + seq] = k, v
        past_keys, past_values = (x[:, :, : first + seq] for x in (keys, values))
        attend = self.torch.nn.functional.scaled_dot_product_attention
        y = attend(q, past_keys, past_values, is_causal=seq > 1, enable_gqa=True)
        return y.transpose(1, 2).reshape(batch, seq, -1)
