"""Queries, keys and values of a model on a text, captured in torch as each attention reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rotquant_tvm.evaluation.attention_error import AttentionInput
from rotquant_tvm.frontend.hf import load
from rotquant_tvm.frontend.torch_export import DecoderStep, probe_attention, rotquant_attention


def capture_attention(model: Path, ids: np.ndarray) -> list[AttentionInput]:
    """Run the model in float32 on ids int [tokens] and return what every attention read, by cache layer.

    Raises ModelError for a model that cannot be imported.
    """
    return captured(load(model, torch.float32).model, ids)


def captured(model: Any, ids: np.ndarray) -> list[AttentionInput]:
    """Do the same for a transformers model in memory, which is left as it was."""
    with rotquant_attention(model):
        probe_attention(model)  # refuses what the project does not support, by name
        step = DecoderStep(model)
        tokens = torch.from_numpy(np.ascontiguousarray(ids, np.int32))[None].to(model.device)
        positions = torch.arange(tokens.shape[1], dtype=torch.int32, device=model.device)[None]
        last = torch.full((1,), tokens.shape[1] - 1, dtype=torch.int32, device=model.device)
        with _Capture() as capture:
            step(tokens, positions, last, {})
    layers = [call.layer for call in step.trace.calls]
    return [site for _, site in sorted(zip(layers, capture.sites, strict=True), key=lambda pair: pair[0])]


class _Capture(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operands of every causal attention that runs inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sites: list[AttentionInput] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.rotquant.causal_attention.default:
            q, k, v, scale, window = args
            q, k, v = (x[0].detach().float().cpu().contiguous().numpy() for x in (q, k, v))
            self.sites.append(AttentionInput(q, k, v, float(scale), window))
        return func(*args, **(kwargs or {}))
