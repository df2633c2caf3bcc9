"""transformers' tiny models as ``torch.onnx.export`` writes them, and onnxruntime on them."""

from __future__ import annotations

import functools
import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..architectures import ARCHITECTURES, VOCAB

BATCH, SEQ, PAST = 2, 3, 5
_FOLDERS: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


class _Step(torch.nn.Module):
    """One call with pasts in and presents out, flat; ``has_cache`` False: ids, mask and positions alone."""

    def __init__(self, model: torch.nn.Module, has_cache: bool) -> None:
        super().__init__()
        self.model, self.has_cache = model, has_cache

    def forward(self, input_ids, attention_mask, position_ids, past):
        arguments = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": self.has_cache}
        if not self.has_cache:
            return self.model(input_ids, **arguments).logits
        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device = keys.dtype, keys.device
            cache.layers.append(layer)
        output = self.model(input_ids, past_key_values=cache, **arguments)
        return output.logits, *(x for layer in output.past_key_values.layers for x in (layer.keys, layer.values))


@dataclass(frozen=True)
class Export:
    """An exported file and the torch model behind it."""

    path: Path
    model: torch.nn.Module
    layers: int
    kv_heads: int
    head_dim: int


def _write(step, arguments, path: Path, opset: int, sizes: dict, presents: list[str]) -> None:
    """By the exporter of today, or for opsets before 18 by the one that traced with TorchScript."""
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in presents)]
    options = {"input_names": inputs, "output_names": ["logits", *(f"present.{name}" for name in presents)]}
    options |= {"opset_version": opset, "verbose": False, "dynamo": opset >= 18}
    if opset < 18:
        pasts = dict(zip(inputs[3:], sizes.pop("past"), strict=True))
        torch.onnx.export(step, arguments, path, dynamic_axes=sizes | pasts, **options)
    else:
        names = ("input_ids", "attention_mask", "position_ids", "past")
        program = torch.onnx.export(step, arguments, dynamic_shapes={name: sizes[name] for name in names}, **options)
        program.save(path)


@functools.cache
def export(
    name: str,
    opset: int,
    mask_rank: int,
    dtype: torch.dtype = torch.float32,
    has_cache: bool = True,
    attention: str = "sdpa",
) -> Export:
    """Export an architecture of ``ARCHITECTURES``; the mask is [batch, total] of int64, or additive with 4 axes.

    ``attention``: transformers' implementation; "sdpa" drops soft-capping.
    """
    architecture = ARCHITECTURES[name]
    model = architecture.model(dtype)
    model.set_attn_implementation(attention)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    layers = model.config.num_hidden_layers
    past_len = PAST if has_cache else 0
    shape = (BATCH, architecture.kv_heads, past_len, architecture.head_dim)
    past = [torch.randn(shape).to(dtype) for _ in range(2 * layers)] if has_cache else []
    ids = torch.randint(3, VOCAB, (BATCH, SEQ))
    positions = torch.arange(past_len, past_len + SEQ)[None].repeat(BATCH, 1)
    mask = torch.from_numpy(masks(BATCH, SEQ, past_len, mask_rank)).to(torch.int64 if mask_rank == 2 else dtype)
    total = "total" if has_cache else "seq"
    sizes = {"input_ids": {0: "batch", 1: "seq"}, "position_ids": {0: "batch", 1: "seq"}}
    sizes["attention_mask"] = {0: "batch", mask_rank - 1: total} | ({2: "seq"} if mask_rank == 4 else {})
    sizes["past"] = [{0: "batch", 2: "past"}] * len(past)
    presents = [f"{kind}.{part}" for kind in range(layers) for part in ("key", "value")] if has_cache else []
    folder = tempfile.TemporaryDirectory(prefix="rotquant-onnx-")
    _FOLDERS.append(folder)
    path = Path(folder.name) / f"{name}.onnx"
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            _write(_Step(model, has_cache).eval(), (ids, mask, positions, past), path, opset, sizes, presents)
    finally:
        logging.disable(before)
    return Export(path, model, layers, architecture.kv_heads, architecture.head_dim)


def masks(batch: int, seq: int, past: int, rank: int) -> np.ndarray:
    """A mask of sequences without padding, in either form."""
    if rank == 2:
        return np.ones((batch, past + seq), np.int64)
    hidden = np.arange(past, past + seq)[:, None] < np.arange(past + seq)
    return np.where(hidden, np.finfo(np.float32).min, 0).astype(np.float32)[None, None].repeat(batch, 0)


class OnnxSteps:
    """onnxruntime on an exported file, step by step over one sequence or a batch of equally long ones."""

    def __init__(self, made: Export, mask_rank: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self.session = onnxruntime.InferenceSession(str(made.path), options, providers=["CPUExecutionProvider"])
        self.made, self.mask_rank = made, mask_rank
        self.names = [value.name for value in self.session.get_inputs()]

    def empty(self, batch: int) -> list[np.ndarray]:
        """Pasts without tokens."""
        shape = (batch, self.made.kv_heads, 0, self.made.head_dim)
        return [np.zeros(shape, np.float32) for _ in range(2 * self.made.layers)]

    def feed(self, ids: np.ndarray, past: list[np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs of one step by name."""
        (batch, seq), length = ids.shape, past[0].shape[2] if past else 0
        inputs = {
            "input_ids": ids.astype(np.int64),
            "position_ids": np.arange(length, length + seq)[None].repeat(batch, 0),
            "attention_mask": masks(batch, seq, length, self.mask_rank),
        }
        inputs |= dict(zip([name for name in self.names if name.startswith("past")], past, strict=True))
        return {name: inputs[name] for name in self.names}

    def __call__(self, ids: np.ndarray, past: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits [batch, seq, vocab] and presents."""
        logits, *presents = self.session.run(None, self.feed(ids, past))
        return logits, presents
