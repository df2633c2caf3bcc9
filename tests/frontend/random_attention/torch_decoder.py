"""A ``Drawn`` as a torch module, in the spellings that people use, and as a model of transformers."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from torch import nn
from torch.export import Dim
from torch.nn import functional

from .drawn_decoder import BASE, EPSILON, INNER, POSITIONS, VOCAB, WIDTH, Drawn, rotary_tables

LENGTH = POSITIONS
"""Of caches of fixed length."""


class TorchDecoder(nn.Module):
    """A decoder whose ``forward`` depends on how the cache is kept; see ``example``."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.drawn = drawn
        for name, value in drawn.weights().items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.from_numpy(value)))
        for name, table in zip(("cos", "sin"), rotary_tables(drawn.head_dim), strict=True):
            self.register_buffer(name, torch.from_numpy(table), persistent=False)
        if drawn.packed:
            for index in range(len(drawn.layers)):
                for suffix in ("", "_bias") if drawn.biased else ("",):
                    parts = [self.get_parameter(f"{index}_{name}{suffix}") for name in "qkv"]
                    self.register_parameter(f"{index}_qkv{suffix}", nn.Parameter(torch.cat(parts, -1)))
        if drawn.cache == "buffers":
            for index in range(len(drawn.layers)):
                for kind in ("keys", "values"):
                    shape = (1, drawn.kv_heads, LENGTH, drawn.head_dim)
                    self.register_buffer(f"{kind}_{index}", torch.zeros(shape))

    def w(self, index: int, name: str) -> torch.Tensor:
        """A layer's weight."""
        return self.get_parameter(f"{index}_{name}")

    def body(self, ids, positions, mask, join):
        """Logits; ``positions`` [batch or 1, seq], ``mask(layer)`` bool or additive, ``join(layer, k, v)``."""
        x = self.embed[ids]
        if self.drawn.rotary == "none":
            x = x + self.places[positions]
        for index, layer in enumerate(self.drawn.layers):
            q, k, v = self.projected(index, functional.rms_norm(x, (WIDTH,), self.w(index, "norm"), EPSILON))
            if self.drawn.rotary != "none":
                q, k = self.turned(q, positions), self.turned(k, positions)
            out = attention(self.drawn, layer, q, *join(index, k, v), mask(layer))
            x = x + out.transpose(1, 2).flatten(2) @ self.w(index, "o")
        return functional.rms_norm(x, (WIDTH,), self.norm, EPSILON) @ self.head

    def projected(self, index: int, x):
        """Queries, keys and values [batch, heads, seq, head_dim]."""
        drawn = self.drawn
        counts = (drawn.heads, drawn.kv_heads, drawn.kv_heads)

        def product(name):
            y = x @ self.w(index, name)
            return y + self.w(index, f"{name}_bias") if drawn.biased else y

        if drawn.packed:
            parts = product("qkv").split([count * drawn.head_dim for count in counts], dim=-1)
        else:
            parts = [product(name) for name in "qkv"]
        shape = (*x.shape[:2], -1, drawn.head_dim)
        return [part.reshape(shape).transpose(1, 2) for part in parts]

    def turned(self, x, positions):
        cos, sin = (table[positions][:, None] for table in (self.cos, self.sin))
        if self.drawn.rotary == "half":
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
            a, b = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-b, a], -1) * sin
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3)


def attention(drawn, layer, q, k, v, mask):
    """[batch, heads, seq, head_dim] of queries over keys and values with kv heads; ``mask`` bool or additive."""
    if drawn.scores == "sdpa":
        grouped = drawn.repeat == "grouped"
        if not grouped:
            k, v = repeated(drawn, k), repeated(drawn, v)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.scale, enable_gqa=grouped)
    apart = drawn.repeat == "grouped" and drawn.group > 1 and drawn.scores != "bmm"
    if apart:
        q = q.unflatten(1, (drawn.kv_heads, drawn.group))
        k, v, mask = k[:, :, None], v[:, :, None], mask[:, :, None] if mask.ndim == 4 else mask
    else:
        k, v = repeated(drawn, k), repeated(drawn, v)
    if drawn.scale_at == "query":
        q = q * layer.scale
    elif drawn.scale_at == "both":
        q, k = q * layer.scale**0.5, k * layer.scale**0.5
    if drawn.scores == "einsum" and not apart:
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
    elif drawn.scores == "bmm":
        flat = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
        scores = flat.unflatten(0, (-1, drawn.heads))
    else:
        scores = q @ k.transpose(-1, -2)
    if drawn.scale_at == "scores":
        scores = scores * layer.scale
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    if mask.dtype is torch.bool:
        lowest = torch.finfo(torch.float32).min
        scores = torch.where(mask, scores, lowest) if drawn.packed else scores.masked_fill(~mask, lowest)
    else:
        scores = scores + mask
    weights = scores.softmax(-1)
    if drawn.scores == "einsum" and not apart:
        return torch.einsum("bhqk,bhkd->bhqd", weights, v)
    if drawn.scores == "bmm":
        return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (-1, drawn.heads))
    out = weights @ v
    return out.flatten(1, 2) if apart else out


def repeated(drawn, x):
    """Keys or values for every query head."""
    if drawn.group == 1:
        return x
    if drawn.repeat == "take":
        return x[:, torch.arange(drawn.kv_heads).repeat_interleave(drawn.group)]
    if drawn.repeat == "interleave":
        return x.repeat_interleave(drawn.group, dim=1)
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, drawn.group, length, dim).reshape(batch, -1, length, dim)


def causal(layer, queries, length):
    """Booleans [..., queries, length]; ``queries`` are positions [..., queries]."""
    distance = queries[..., None] - torch.arange(length)
    return (distance >= 0) & (distance < layer.window) if layer.window else distance >= 0


class PastDecoder(TorchDecoder):
    """Pasts in, presents out; positions and the mask as drawn."""

    def forward(self, ids, positions, mask, past):
        drawn = self.drawn
        axis = {"past-bshd": 1, "past": 2}.get(drawn.cache, 2)
        start = past[0][1].shape[axis]
        length = start + ids.shape[1]
        presents = []

        def join(index, k, v):
            if drawn.cache == "past-bshd":
                k, v = k.transpose(1, 2), v.transpose(1, 2)
            if drawn.cache == "past-transposed":
                k = k.transpose(2, 3)
            k = torch.cat([past[index][0], k], 3 if drawn.cache == "past-transposed" else axis)
            v = torch.cat([past[index][1], v], axis)
            presents.append((k, v))
            if drawn.cache == "past-transposed":
                return k.transpose(2, 3), v
            return (k.transpose(1, 2), v.transpose(1, 2)) if drawn.cache == "past-bshd" else (k, v)

        def masks(layer):
            if drawn.mask.startswith("given"):
                return mask
            seen = causal(layer, torch.arange(start, length), length)
            if drawn.mask == "padding":
                seen = seen[None, None] & mask.bool()[:, None, None]
            return seen

        return self.body(ids, positions, masks, join), presents

    def example(self) -> tuple[tuple, tuple]:
        """Example inputs and their dynamic sizes."""
        drawn = self.drawn
        batch, seq, past = (Dim(name) for name in ("batch", "seq", "past"))
        ids = torch.zeros((2, 3), dtype=torch.int64)
        shapes = {
            "past-bshd": ((2, 5, drawn.kv_heads, drawn.head_dim),) * 2,
            "past-transposed": ((2, drawn.kv_heads, drawn.head_dim, 5), (2, drawn.kv_heads, 5, drawn.head_dim)),
        }.get(drawn.cache, ((2, drawn.kv_heads, 5, drawn.head_dim),) * 2)
        mask, sizes = None, None
        if drawn.mask == "padding":
            mask, sizes = torch.ones((2, 8), dtype=torch.int64), {0: batch, 1: Dim.AUTO}
        elif drawn.mask.startswith("given"):
            mask = torch.arange(5, 8)[:, None] >= torch.arange(8)
            mask = mask if drawn.mask == "given-bool" else torch.where(mask, 0.0, torch.finfo(torch.float32).min)
            mask, sizes = mask[None, None].repeat(2, 1, 1, 1), {0: batch, 2: seq, 3: Dim.AUTO}
        pasts = [tuple(torch.zeros(shape) for shape in shapes) for _ in drawn.layers]
        axes = [{0: batch, shape.index(5): past} for shape in shapes]
        positions = torch.arange(5, 8)[None].repeat(2, 1)
        dims = ({0: batch, 1: seq}, {0: batch, 1: seq}, sizes, [tuple(axes) for _ in drawn.layers])
        return (ids, positions, mask, pasts), dims


class PlainDecoder(TorchDecoder):
    """No cache."""

    def forward(self, ids):
        length = ids.shape[1]
        positions = torch.arange(length)
        return self.body(
            ids, positions[None], lambda layer: causal(layer, positions, length), lambda index, k, v: (k, v)
        )

    def example(self) -> tuple[tuple, tuple]:
        """Example inputs and their dynamic sizes."""
        return (torch.zeros((2, 3), dtype=torch.int64),), ({0: Dim("batch"), 1: Dim("seq")},)


class WrittenDecoder(TorchDecoder):
    """Caches of fixed length, written in place: given [batch, length, heads, head_dim], or buffers of one sequence."""

    def forward(self, ids, input_pos, caches):
        def join(index, k, v):
            if self.drawn.cache == "buffers":
                keys, values = self.get_buffer(f"keys_{index}"), self.get_buffer(f"values_{index}")
                keys[:, :, input_pos], values[:, :, input_pos] = k, v
                return keys, values
            keys, values = caches[index]
            keys[:, input_pos], values[:, input_pos] = k.transpose(1, 2), v.transpose(1, 2)
            return keys.transpose(1, 2), values.transpose(1, 2)

        return self.body(ids, input_pos[None], lambda layer: causal(layer, input_pos, LENGTH), join)

    def example(self) -> tuple[tuple, tuple]:
        """Example inputs and their dynamic sizes."""
        drawn, seq = self.drawn, Dim("seq", max=LENGTH)
        if drawn.cache == "buffers":
            return (torch.zeros((1, 3), dtype=torch.int64), torch.arange(3), None), ({1: seq}, {0: seq}, None)
        shape, batch = (2, LENGTH, drawn.kv_heads, drawn.head_dim), Dim("batch")
        caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in drawn.layers]
        dims = ({0: batch, 1: seq}, {0: seq}, [({0: batch}, {0: batch}) for _ in drawn.layers])
        return (torch.zeros((2, 3), dtype=torch.int64), torch.arange(3), caches), dims


def torch_decoder(drawn: Drawn) -> TorchDecoder:
    """The module that keeps its cache as drawn."""
    kinds = {"none": PlainDecoder, "written": WrittenDecoder, "buffers": WrittenDecoder}
    return kinds.get(drawn.cache, PastDecoder)(drawn).eval()


def transformers_decoder(drawn: Drawn) -> transformers.PreTrainedModel:
    """A Llama, or a Mistral where there is a window, or a Qwen2 where there are biases."""
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": INNER, "rms_norm_eps": EPSILON}
    sizes |= {"num_hidden_layers": len(drawn.layers), "num_attention_heads": drawn.heads, "head_dim": drawn.head_dim}
    sizes |= {"num_key_value_heads": drawn.kv_heads, "max_position_embeddings": POSITIONS, "tie_word_embeddings": False}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes |= {"rope_parameters": {"rope_type": "default", "rope_theta": BASE}}
    window = drawn.layers[0].window
    if drawn.biased:
        own = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
        config = transformers.Qwen2Config(**sizes, **own)
    else:
        kind = transformers.MistralConfig if window else transformers.LlamaConfig
        config = kind(**sizes, **({"sliding_window": window} if window else {}))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    names = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    parts = {"norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
    parts |= {name: f"self_attn.{name}_proj.weight" for name in "qkvo"}
    parts |= {f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkv"}
    parts |= {name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    for index in range(len(drawn.layers)):
        names |= {f"{index}.{name}": f"model.layers.{index}.{there}" for name, there in parts.items()}
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in drawn.weights().items():
            target = own.pop(names[name])
            target.copy_(torch.from_numpy(np.ascontiguousarray(value if name == "embed" else value.T)))
    assert not own, sorted(own)
    return model
