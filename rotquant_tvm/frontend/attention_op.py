"""Attention as one torch operator, and its registration with transformers.

transformers calls two functions that we register under the name ``rotquant``: one is asked for a mask, one for
attention. The first answers with a :class:`CausalMask` instead of a tensor, which transformers hands to the
second, so each attention states its own mask; that the mask was causal, or causal with a window, is checked
after the run. Whatever else a model asks of its attention is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from rotquant_tvm.errors import ModelError

if TYPE_CHECKING:
    from rotquant_tvm.frontend.growing_cache import GrowingCache

NAME = "rotquant"

# Arguments that change nothing in the result of one inference step; any other must be absent, None or False.
_WITHOUT_EFFECT = {"position_ids", "position_embeddings", "use_cache", "cache_position", "layer_idx"}


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

        Masks are functions of indices; they are evaluated here, after the run, since a traced run has no values.
        """
        if not all(_is_causal(mask_function, window) for mask_function, window in self.masks):
            raise ModelError(f"{self.model_type!r} asks for a mask that is neither causal nor causal with a window")


_TRACE: ContextVar[Trace | None] = ContextVar("rotquant_trace", default=None)


@contextmanager
def tracing(trace: Trace, cache: GrowingCache) -> Iterator[Trace]:
    """Record the attention calls of one run over ``cache`` in ``trace``."""
    trace.cache, trace.calls, trace.masks = cache, [], []
    token = _TRACE.set(trace)
    try:
        yield trace
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


@torch.library.custom_op(
    "rotquant::causal_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, int? window) -> Tensor",
)
def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Grouped-query attention, the last query aligned with the last key.

    ``q`` [batch, heads, seq, head_dim], ``k`` and ``v`` [batch, kv_heads, length, head_dim];
    returns [batch, seq, heads, head_dim]. Scores and softmax are in float32.
    """
    batch, heads, seq, head_dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    grouped = q.float().reshape(batch, kv_heads, heads // kv_heads, seq, head_dim)
    scores = grouped @ k.float().transpose(2, 3).unsqueeze(2) * scale
    distance = torch.arange(length - seq, length)[:, None] - torch.arange(length)
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    weights = scores.masked_fill(~visible.to(scores.device), -math.inf).softmax(-1)
    out = (weights @ v.float().unsqueeze(2)).reshape(batch, heads, seq, v.shape[3])
    return out.to(q.dtype).transpose(1, 2).contiguous()


@causal_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op(
    "rotquant::select_token", mutates_args=(), schema="(Tensor hidden, Tensor last) -> Tensor"
)
def select_token(hidden: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Take token ``last[i]`` of each row: hidden [batch, seq, width], last int32 [batch] → [batch, width]."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last.long()].contiguous()


@select_token.register_fake
def _(hidden: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], hidden.shape[2])


def _answer_mask(
    *, mask_function: Any, local_size: int | None = None, use_vmap: bool = False, **_: Any
) -> CausalMask:
    """Stand for the mask that transformers asks for, and remember what it was."""
    trace = _current_trace()
    if use_vmap:
        raise ModelError(f"{trace.model_type!r} combines its causal mask with one of its own, which is not supported")
    trace.masks.append((mask_function, local_size))
    return CausalMask(local_size)


def _is_causal(mask_function: Any, window: int | None) -> bool:
    """Whether a mask function of transformers is causal, by its values where a difference would show."""
    edge = window if window is not None else 64
    near = {edge * m + o for m in (0, 1, 2, 3) for o in (-2, -1, 0, 1, 2)}
    index = torch.tensor(sorted(i for i in near | {5, 1000, 70000} if i >= 0))
    q, kv = index[:, None], index[None, :]
    zero = torch.zeros((), dtype=torch.int64)
    expected = (kv <= q) if window is None else (kv <= q) & (kv > q - window)
    try:
        actual = mask_function(zero, zero, q, kv)
    except Exception:  # it reads data of the batch: not a function of the positions alone
        return False
    return bool((torch.as_tensor(actual).expand_as(expected) == expected).all())


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention for transformers; the mask decides the window, as in its own eager attention."""
    trace = _current_trace()
    name = f"{trace.model_type!r}: {type(module).__name__}"
    for argument, given in kwargs.items():
        if argument not in _WITHOUT_EFFECT and given is not None and given is not False:
            raise ModelError(f"{name} passes {argument!r} to its attention, which is not supported")
    if dropout:
        raise ModelError(f"{name} asks for dropout; call model.eval() first")
    if is_causal is False or not isinstance(attention_mask, CausalMask):
        raise ModelError(f"{name} attends without a causal mask; only causal decoders are supported")
    layer = trace.cache.layer_of(key, value)
    if layer is None or any(call.layer == layer for call in trace.calls):
        raise ModelError(f"{name} does not read its own keys and values as its cache returned them")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    _, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    if value.shape[-1] != head_dim or key.shape[-1] != head_dim or heads % kv_heads:
        shapes = f"{heads}x{head_dim}, {kv_heads}x{key.shape[-1]}, {value.shape[1]}x{value.shape[-1]}"
        raise ModelError(f"{name} has heads that do not fit together (queries, keys, values: {shapes})")
    trace.calls.append(AttentionCall(layer, heads, kv_heads, head_dim, scale, attention_mask.window))
    return causal_attention(query, key, value, scale, attention_mask.window), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _answer_mask)
