"""Whole decoders of onnxruntime's tools: imported, compiled, and their logits through two chunks and eight steps.

With a 16-bit cache the reference is onnxruntime; with a packed one torch, over the codes that the cache stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

import rotquant_tvm
from rotquant_tvm.frontend.normalize import normalize_step
from rotquant_tvm.kv_cache_config import KVCacheConfig

from ...sampling import sampled
from ..architectures import ARCHITECTURES, Architecture
from ..fake_quantized import converse, replay
from .genai_model import GenAIGraph
from .gpt2_model import gpt2_graph
from .merged_model import export, merged
from .onnx_cases import imported, session
from .step_runner import StepRunner, check_close

STEPS = 8
MULTI_HEAD = Architecture("Llama", {"num_key_value_heads": 4}, kv_heads=4)


@dataclass
class Source:
    """A model of transformers and an ONNX file made of it."""

    architecture: Architecture
    torch_model: Any
    onnx_model: onnx.ModelProto
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def feed(self, ids: np.ndarray, past: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
        """Inputs of a step of ids [batch, seq] after ``past`` random keys and values."""
        rng = np.random.default_rng(seed)
        batch, seq = ids.shape
        feed = {"input_ids": ids.astype(np.int64), "position_ids": np.tile(np.arange(seq) + past, (batch, 1))}
        for value in self.onnx_model.graph.input:
            dims = value.type.tensor_type.shape.dim
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            if value.name == "attention_mask":
                feed[value.name] = np.ones((batch, past + seq), dtype)
            elif len(dims) > 3:
                sizes = [2] * (len(dims) == 5) + [batch, dims[-3].dim_value, past, dims[-1].dim_value]
                feed[value.name] = rng.standard_normal(sizes).astype(dtype)
        return feed | self.extra


def genai(architecture: Architecture, **options) -> Source:
    """A decoder of onnxruntime-genai's model builder."""
    model = architecture.model()
    return Source(architecture, model, GenAIGraph(model, **options).onnx_model())


def optimum() -> Source:
    """A merged decoder."""
    model = ARCHITECTURES["llama"].model()
    with TemporaryDirectory() as folder:
        parts = [export(model, Path(folder) / f"{past}.onnx", past) for past in (True, False)]
    return Source(ARCHITECTURES["llama"], model, merged(*parts), {"use_cache_branch": np.array([True])})


def gpt2() -> Source:
    """A GPT-2 with onnxruntime's fused operators."""
    model = ARCHITECTURES["gpt2"].model()
    return Source(ARCHITECTURES["gpt2"], model, gpt2_graph(model))


SOURCES = {
    "genai": lambda: genai(ARCHITECTURES["llama"]),
    "genai-4-bit": lambda: genai(ARCHITECTURES["llama"], bits=4, packed=True),
    "genai-8-bit-shared-buffer": lambda: genai(ARCHITECTURES["qwen3"], bits=8, capacity=160),
    "genai-window": lambda: genai(ARCHITECTURES["mistral"], packed=True),
    "genai-half": lambda: genai(ARCHITECTURES["llama"], dtype=np.float16),
    "genai-multi-head": lambda: genai(MULTI_HEAD, multi_head=True),
    "optimum-merged": optimum,
    "gpt2-fused": gpt2,
}


@cache
def source(name: str) -> Source:
    """A source, made once."""
    return SOURCES[name]()


@cache
def canonical(name: str) -> rotquant_tvm.frontend.ImportedModel:
    """The import of a source."""
    with TemporaryDirectory() as folder:
        return normalize_step(imported(source(name).onnx_model, Path(folder)))


@pytest.mark.parametrize("name", sampled(SOURCES, ["gpt2-fused", "optimum-merged"]))
def test_a_step_computes_what_onnxruntime_computes(name, tmp_path):
    made = source(name)
    step = imported(made.onnx_model, tmp_path)
    feed = made.feed(np.random.default_rng(1).integers(3, 97, (1, 5)), past=29)
    results, reference = StepRunner(step)(feed), session(made.onnx_model)
    wanted = reference.run(None, {value.name: shared(made, feed, value) for value in reference.get_inputs()})
    for value, out in zip(reference.get_outputs(), wanted, strict=True):
        out = out[..., :34, :] if out.ndim > 3 else out
        check_close(value.name, results[value.name], out, 1e-4 if out.dtype == np.float32 else 1e-2)


def shared(made: Source, feed: dict[str, np.ndarray], value) -> np.ndarray:
    """An input as onnxruntime takes it: a past in its buffer."""
    array = feed[value.name]
    if array.ndim > 3 and isinstance(value.shape[-2], int):
        buffer = np.zeros((*array.shape[:-2], value.shape[-2], array.shape[-1]), array.dtype)
        buffer[..., : array.shape[-2], :] = array
        return buffer
    return array


def reference_logits(made: Source, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Onnxruntime's logits of every token of each row, each alone and in one call."""
    runtime = session(made.onnx_model)
    results = []
    for row in rows:
        feed = made.feed(row[None])
        inputs = {value.name: shared(made, feed, value) for value in runtime.get_inputs()}
        results.append(runtime.run(["logits"], inputs)[0][0].astype(np.float32))
    return results


@pytest.mark.parametrize("name", sampled(SOURCES, []))
def test_compiled_with_a_16_bit_cache(name):
    made = source(name)
    compiled = rotquant_tvm.compile(canonical(name), "f16")
    config = KVCacheConfig.parse("f16")
    turns = converse(compiled.session(batch=2, capacity=128), config, made.architecture.head_dim, STEPS)
    rows = [np.concatenate([turn.ids[row] for turn in turns]) for row in range(2)]
    reference = reference_logits(made, rows)
    for turn in turns:
        for row in range(2):
            wanted = reference[row][turn.starts[row] + len(turn.ids[row]) - 1]
            assert np.abs(turn.logits[row] - wanted).max() <= 5e-3 * np.abs(wanted).max()


@pytest.mark.parametrize("name", sampled(SOURCES, ["genai-4-bit"]))
def test_compiled_with_a_packed_cache(name):
    made, config = source(name), KVCacheConfig.parse("iso3")
    compiled = rotquant_tvm.compile(canonical(name), "iso3")
    turns = converse(compiled.session(batch=2, capacity=128), config, made.architecture.head_dim, STEPS)
    reference, _, furthest = replay(made.torch_model, turns, config, made.architecture.windows)
    assert furthest <= (1e-4 if name != "genai-half" else 2e-2)
    for turn, wanted in zip(turns, reference, strict=True):
        assert np.abs(turn.logits - wanted).max() <= (2e-3 if name != "genai-half" else 5e-2)


def test_the_branch_of_a_merged_decoder_is_told():
    (note,) = canonical("optimum-merged").config["notes"]
    assert "the one with a cache was taken" in note


@pytest.mark.full
def test_bfloat16():
    """Onnxruntime has no kernels for it on CPUs; torch's float32 is the reference, with the weights as rounded."""
    model = ARCHITECTURES["llama"].model()
    rows = [np.arange(3, 20, dtype=np.int32), np.arange(40, 47, dtype=np.int32)]
    with TemporaryDirectory() as folder:
        step = imported(GenAIGraph(model, dtype=ml_dtypes.bfloat16, bits=4).onnx_model(), Path(folder))
    assert {str(weight.dtype) for weight in step.weights} == {"bfloat16"}
    with torch.no_grad():
        wanted = np.stack([model(torch.from_numpy(row[None]).long()).logits[0, -1].numpy() for row in rows])
    logits = rotquant_tvm.compile(normalize_step(step), "f16").session(batch=2, capacity=64).prefill(rows)
    assert np.abs(logits - wanted).max() <= 2e-2 * np.abs(wanted).max()
