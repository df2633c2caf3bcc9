"""Our attention as one of transformers' implementations, and the record of what a model asks of it.

transformers calls two functions registered under the name ``rotquant``: one is asked for a mask, one for
attention. The first answers with a :class:`CausalMask` instead of a tensor, which transformers hands to the
second, so each attention states its own mask. That the masks were causal, or causal with a window, is checked
after the run; whatever else a model asks of its attention is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.attention_op import causal_attention
from rotquant_tvm.frontend.growing_cache import GrowingCache

NAME = "rotquant"

# Arguments that do not change what one inference step computes; any other must be absent, None or False.
_WITHOUT_EFFECT = {"position_ids", "position_embeddings", "use_cache", "cache_position", "layer_idx"}
_MEANING = {"s_aux": " (attention sinks)", "indices": " (sparse attention)"}


@dataclass(frozen=True)
class CausalMask:
    """A causal mask; ``window`` tokens are visible, the token itself included (None: all before it)."""

    window: int | None = None


@dataclass(frozen=True)
class AttentionCall:
    """One attention as the model asks for it, with the index of the cache layer that it reads."""

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None = None


@dataclass
class Trace:
    """What the last run of a model did with its attention: its calls, and the masks that it asked for."""

    model_type: str
    cache: GrowingCache | None = None
    calls: list[AttentionCall] = field(default_factory=list)
    masks: list[tuple[Callable[..., Any], int | None]] = field(default_factory=list)

    def calls_by_layer(self) -> list[AttentionCall]:
        """Return the calls in the order of the cache layers that they read."""
        return sorted(self.calls, key=lambda call: call.layer)

    def check_masks(self) -> None:
        """Raise ModelError unless every mask is causal, or causal with the window it was announced with.

        Masks are functions of indices; they are evaluated after the run, since a traced run has no values.
        """
        if not all(is_causal_mask(mask_function, window) for mask_function, window in self.masks):
            raise ModelError(
                f"{self.model_type!r} asks for a mask that is neither causal nor causal with a window"
            )


_TRACE: ContextVar[Trace | None] = ContextVar("rotquant_trace", default=None)


@contextmanager
def recording(trace: Trace, cache: GrowingCache) -> Iterator[None]:
    """Record in ``trace``, from empty, what the model that runs inside over ``cache`` does."""
    trace.cache, trace.calls, trace.masks = cache, [], []
    token = _TRACE.set(trace)
    try:
        yield
    finally:
        _TRACE.reset(token)


def _current_trace() -> Trace:
    trace = _TRACE.get()
    if trace is None:
        raise ModelError(
            f"the attention implementation {NAME!r} only runs during an import; "
            "call model.set_attn_implementation('sdpa') to use the model in torch"
        )
    return trace


def answer_mask(
    *, mask_function: Any, local_size: int | None = None, use_vmap: bool = False, **_: Any
) -> CausalMask:
    """Stand for the mask that transformers asks for, and remember what it was."""
    trace = _current_trace()
    if use_vmap:  # set where the model passes a mask function of its own
        raise ModelError(
            f"{trace.model_type!r} adds a mask of its own to the causal one; it is not supported"
        )
    trace.masks.append((mask_function, local_size))
    return CausalMask(local_size)


def is_causal_mask(mask_function: Any, window: int | None) -> bool:
    """Compare a mask function of transformers with the causal one where a difference would show."""
    edge = window if window is not None else 64
    near = {edge * m + o for m in (0, 1, 2, 3) for o in (-2, -1, 0, 1, 2)}
    index = torch.tensor(sorted(i for i in near | {5, 1000, 70000} if i >= 0))
    q, kv = index[:, None], index[None, :]
    zero = torch.zeros((), dtype=torch.int64)
    expected = (kv <= q) if window is None else (kv <= q) & (kv > q - window)
    try:
        return bool((torch.as_tensor(mask_function(zero, zero, q, kv)) == expected).all())
    except Exception:  # it reads data of the batch: not a function of the positions alone
        return False


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention for transformers.

    The mask alone decides the window, as in transformers' own eager attention; dropout is for training.
    """
    trace = _current_trace()
    name = f"{trace.model_type!r}: {type(module).__name__}"
    for argument, given in kwargs.items():
        if argument not in _WITHOUT_EFFECT and given is not None and given is not False:
            meaning = _MEANING.get(argument, "")
            raise ModelError(f"{name} passes {argument!r}{meaning} to its attention, which is not supported")
    if is_causal is False or not isinstance(attention_mask, CausalMask):
        raise ModelError(f"{name} attends without a causal mask; only causal decoders are supported")
    layer = trace.cache.layer_of(key, value) if trace.cache else None
    if layer is None or any(call.layer == layer for call in trace.calls):
        raise ModelError(f"{name} does not read its own keys and values as its cache returned them")
    heads, head_dim, kv_heads = query.shape[1], query.shape[3], key.shape[1]
    if not head_dim == key.shape[3] == value.shape[3] or heads % kv_heads:
        shapes = ", ".join(f"{x.shape[1]}x{x.shape[3]}" for x in (query, key, value))
        raise ModelError(f"{name} has heads that do not fit together (queries, keys, values: {shapes})")
    scale = float(scaling) if scaling is not None else head_dim**-0.5
    cap = float(softcap) if softcap is not None else None
    if cap is not None and not 0 < cap < math.inf:
        raise ModelError(f"{name} caps its scores softly at {softcap}; a cap is a positive number")
    window = attention_mask.window
    trace.calls.append(AttentionCall(layer, heads, kv_heads, head_dim, scale, window, cap))
    return causal_attention(query, key, value, scale, window, cap), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, answer_mask)
