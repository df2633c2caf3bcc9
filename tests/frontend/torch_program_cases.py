"""One exported program of every form, each made once, and what torch computes for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers.cache_utils import DynamicCache
from transformers.integrations import executorch

from rotquant_tvm.frontend.torch_program_module import export_module

from .torch_modules import (
    HEAD_DIM,
    KV_HEADS,
    LENGTH,
    BufferDecoder,
    PastDecoder,
    PlainDecoder,
    WrittenDecoder,
    randomized,
)

_TINY = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT2 = {"vocab_size": 97, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}


@dataclass(frozen=True)
class Case:
    """``export`` makes the program of ``module``; ``logits`` runs it over whole rows of ids without a cache."""

    module: Callable[[], nn.Module]
    export: Callable[[nn.Module], ExportedProgram]
    logits: Callable[[nn.Module, torch.Tensor], torch.Tensor]


class _StepWithCache(nn.Module):
    """A transformers model that takes and returns a DynamicCache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past_key_values):
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=True,
        )
        return output.logits, output.past_key_values


class _StepWithTuples(_StepWithCache):
    """The same with legacy tuples."""

    def forward(self, input_ids, attention_mask, position_ids, past_key_values):
        logits, cache = super().forward(input_ids, attention_mask, position_ids, DynamicCache(past_key_values))
        return logits, tuple((layer.keys, layer.values) for layer in cache.layers)


def transformers_model(kind: str, **overrides) -> nn.Module:
    sizes = _GPT2 if kind == "GPT2" else _TINY
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes | tokens | overrides)
    return randomized(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))


def _export_cache(model) -> ExportedProgram:
    executorch.register_dynamic_cache_export_support()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros((2, 5), dtype=torch.int64), past_key_values=cache)
    batch, seq, past = Dim("batch"), Dim("seq"), Dim("past")
    layers = len(cache.layers)
    ids = torch.zeros((2, 3), dtype=torch.int64)
    return torch.export.export(
        _StepWithCache(model),
        (ids, torch.ones((2, 8), dtype=torch.int64), ids.clone(), cache),
        dynamic_shapes=(
            *({0: batch, 1: seq}, {0: batch, 1: Dim.AUTO}, {0: batch, 1: seq}),
            [[{0: batch, 2: past}] * layers] * 2,
        ),
        strict=False,
    )


def _export_tuples(model) -> ExportedProgram:
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    ids = torch.zeros((2, 3), dtype=torch.int64)
    past = tuple(tuple(torch.zeros(2, heads, 5, HEAD_DIM) for _ in "kv") for _ in range(2))
    batch, seq, length = Dim("batch"), Dim("seq"), Dim("past")
    return torch.export.export(
        _StepWithTuples(model),
        (ids, torch.ones((2, 8), dtype=torch.int64), ids.clone(), past),
        dynamic_shapes=(
            *({0: batch, 1: seq}, {0: batch, 1: Dim.AUTO}, {0: batch, 1: seq}),
            (({0: batch, 2: length},) * 2,) * 2,
        ),
        strict=False,
    )


def _export_static(model, strict: bool = True) -> ExportedProgram:
    model.generation_config.cache_implementation, model.generation_config.use_cache = "static", True
    step = executorch.TorchExportableModuleForDecoderOnlyLM(model, 1, LENGTH)
    seq = Dim("seq", max=LENGTH - 1)
    return step.export(
        input_ids=torch.zeros((1, 3), dtype=torch.int64),
        cache_position=torch.arange(3),
        dynamic_shapes={"input_ids": {1: seq}, "cache_position": {0: seq}},
        strict=strict,
    )


def _export_past(module) -> ExportedProgram:
    tokens = torch.zeros((2, 3), dtype=torch.int64)
    past = [tuple(torch.zeros(2, KV_HEADS, 5, HEAD_DIM) for _ in "kv") for _ in range(2)]
    return export_module(module, (tokens, tokens.clone(), past))


def _export_buffers(module) -> ExportedProgram:
    seq = Dim("seq", max=LENGTH)
    inputs = {"idx": torch.zeros((1, 3), dtype=torch.int64), "input_pos": torch.arange(3)}
    return export_module(module, inputs, {"idx": {1: seq}, "input_pos": {0: seq}})


def _export_written(module) -> ExportedProgram:
    batch, seq = Dim("batch"), Dim("seq", max=LENGTH)
    caches = _caches(2)
    inputs = {"idx": torch.zeros((2, 3), dtype=torch.int64), "input_pos": torch.arange(3), "caches": caches}
    shapes = {"idx": {0: batch, 1: seq}, "input_pos": {0: seq}, "caches": [({0: batch},) * 2] * 2}
    return export_module(module, inputs, shapes)


def _caches(batch: int) -> list:
    return [tuple(torch.zeros(batch, LENGTH, KV_HEADS, HEAD_DIM) for _ in "kv") for _ in range(2)]


def _past_logits(module, ids):
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return module(ids, positions, [(torch.zeros(len(ids), KV_HEADS, 0, HEAD_DIM),) * 2] * 2)[0]


def _buffer_logits(module, ids):
    return torch.cat([module(row[None], torch.arange(len(row))) for row in ids])


def _written_logits(module, ids):
    return module(ids, torch.arange(ids.shape[1]), _caches(len(ids)))


def _model_logits(model, ids):
    return model(ids).logits


_llama = functools.partial(transformers_model, "Llama")
CASES = {
    "past": Case(lambda: randomized(PastDecoder()), _export_past, _past_logits),
    "buffers": Case(lambda: randomized(BufferDecoder()), _export_buffers, _buffer_logits),
    "plain": Case(
        lambda: randomized(PlainDecoder()),
        lambda module: export_module(module, (torch.zeros((2, 3), dtype=torch.int64),)),
        lambda module, ids: module(ids),
    ),
    "cache": Case(_llama, _export_cache, _model_logits),
    "static": Case(_llama, _export_static, _model_logits),
    "static-not-strict": Case(_llama, functools.partial(_export_static, strict=False), _model_logits),
    "written": Case(lambda: randomized(WrittenDecoder()), _export_written, _written_logits),
    "gpt2-tuples": Case(functools.partial(transformers_model, "GPT2"), _export_tuples, _model_logits),
}

"""Each form of a program once."""


def _eager(model: nn.Module) -> nn.Module:
    model.set_attn_implementation("eager")
    return model


_gemma2 = functools.partial(transformers_model, "Gemma2", head_dim=32, sliding_window=8, attn_logit_softcapping=2.0)
MORE_CASES = {
    "cache-half": Case(lambda: _llama().half(), _export_cache, _model_logits),
    "cache-bfloat16": Case(lambda: _llama().bfloat16(), _export_cache, _model_logits),
    "cache-spelled-out": Case(lambda: _eager(_llama()), _export_cache, _model_logits),
    "static-window": Case(
        functools.partial(transformers_model, "Mistral", sliding_window=8), _export_static, _model_logits
    ),
    "static-window-softcap": Case(lambda: _eager(_gemma2()), _export_static, _model_logits),
    "buffers-taken-apart": Case(
        lambda: randomized(BufferDecoder()), lambda m: _export_buffers(m).run_decompositions(), _buffer_logits
    ),
    "past-taken-apart": Case(
        lambda: randomized(PastDecoder()), lambda m: _export_past(m).run_decompositions(), _past_logits
    ),
}
"""Other dtypes and other spellings of attention."""


@functools.cache
def exported(name: str) -> ExportedProgram:
    """The program of a case; it is not to be changed."""
    case = (CASES | MORE_CASES)[name]
    return case.export(case.module())


def torch_logits(name: str, ids: np.ndarray) -> np.ndarray:
    """Logits [batch, seq, vocab] of a fresh module of a case."""
    case = (CASES | MORE_CASES)[name]
    with torch.no_grad():
        return case.logits(case.module(), torch.from_numpy(ids).long()).float().numpy()
