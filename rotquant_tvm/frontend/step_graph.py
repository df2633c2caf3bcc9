"""A decoder's step as its source spells it: what importers of graphs hand to ``normalize_step``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import tvm

SOFTCAPS = "rotquant.softcaps"
"""Function attribute: one float per ``nn.attention*`` call in the order of the bindings, 0 for none. Scaled
scores s become cap * tanh(s / cap) before the mask. Without the attribute no attention is capped."""


@dataclass(frozen=True)
class StepGraph:
    """One call of a decoder: tokens and the cache in, logits and the grown cache out.

    Attributes: ``mod`` with one Relax function "main", whose parameters are the source's inputs and then the
    weights, whose body is one dataflow block and which returns a tuple (or one tensor); ``inputs`` and
    ``outputs``, the source's names of ``params[:len(inputs)]`` and of the tuple's fields; ``weights``, the
    values of the other parameters in order (views of the source's memory where possible), and
    ``weight_names``; ``source`` ("model.onnx"), for messages; ``config``, what the source says of itself
    (``model_type``, ``max_position``, …; all optional).

    Attention is ``R.nn.attention(causal_mask="BottomRight", window_size=…)`` where the source's operator says
    that it is causal and ``R.nn.attention_bias`` where a mask is given (boolean masks as additive ones), with
    operands [batch, seq, heads, head_dim] and fewer heads in K and V for grouped queries; or it is spelled
    out in products and a softmax, which is gathered later. Soft-capping is in the attribute ``SOFTCAPS``.
    """

    mod: tvm.IRModule
    inputs: list[str]
    outputs: list[str]
    weights: list[np.ndarray]
    weight_names: list[str]
    source: str
    config: dict[str, Any] = field(default_factory=dict)
