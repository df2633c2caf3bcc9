"""How far quantized keys and values move the output of one attention, in NumPy with the project's own codecs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import Codec
from rotquant_tvm.formats.centre import decode_centre, encode_centre

Array = NDArray[np.float32]


@dataclass(frozen=True)
class AttentionInput:
    """What one attention read of one sequence.

    ``q`` float32 [heads, tokens, d]; ``k``, ``v`` [kv_heads, tokens, d]; ``scale`` of the scores; ``window``: how many
    tokens are visible, the own one included, or None for all before it.
    """

    q: Array
    k: Array
    v: Array
    scale: float
    window: int | None


@dataclass(frozen=True)
class AttentionError:
    """Relative L2 errors of an attention's output: K and V quantized, only K, only V."""

    both: float
    k: float
    v: float


def attention_error(site: AttentionInput, codecs: tuple[Codec, Codec], policy: CachePolicy) -> AttentionError:
    """Return ‖O − Ô‖ / ‖O‖ over all tokens and heads, every token decoded with the cache that it would find.

    A query at token t reads what the policy keeps of tokens 0 … t in 16 bits as float16, the rest quantized (and
    centred); ``defer`` is left out, as after it has drained. Computed in float32.
    """
    tokens, group = site.k.shape[1], len(site.q) // len(site.k)
    keys = quantized(site.k, codecs[0], policy, centred=True)
    values = quantized(site.v, codecs[1], policy, centred=False)
    half_keys, half_values = (x.astype(np.float16).astype(np.float32) for x in (site.k, site.v))
    visible, packed = visible_tokens(tokens, site.window), packed_tokens(tokens, policy)
    errors, norm = np.zeros(3), 0.0
    for head, q in enumerate(site.q):
        at = head // group
        exact = _softmax(q @ site.k[at].T * site.scale, visible)
        scores = np.where(packed, q @ keys[at].T, q @ half_keys[at].T) * site.scale
        weights = _softmax(scores, visible)
        output = exact @ site.v[at]
        for index, (w, moved) in enumerate(((weights, True), (weights, False), (exact, True))):
            if moved:
                ours = np.where(packed, w, 0) @ values[at] + np.where(packed, 0, w) @ half_values[at]
            else:
                ours = w @ site.v[at]
            errors[index] += float(((ours - output).astype(np.float64) ** 2).sum())
        norm += float((output.astype(np.float64) ** 2).sum())
    both, k, v = np.sqrt(errors / norm) if norm else errors
    return AttentionError(float(both), float(k), float(v))


def quantized(x: Array, codec: Codec, policy: CachePolicy, centred: bool) -> Array:
    """Return x̂ of x [kv_heads, tokens, d], blocks of K centred as the policy says; sinks are quantized too."""
    centre = np.zeros_like(x)
    if centred and policy.center:
        for start in range(policy.sinks, x.shape[1], policy.center):
            block = slice(start, start + policy.center)
            centre[:, block] = decode_centre(encode_centre(x[:, block].mean(1)))[:, None]
    decoded = codec.decode(codec.encode(x - centre, np.float32), np.float32)
    return (decoded + centre).astype(np.float32)


def packed_tokens(tokens: int, policy: CachePolicy) -> NDArray[np.bool_]:
    """Return bool [query, key]: whether the cache of a query's token holds the key's token in packed tiles."""
    held = np.arange(1, tokens + 1)
    packed = np.maximum(held - policy.sinks - policy.recent, 0) // policy.block * policy.block
    behind = np.arange(tokens) - policy.sinks
    mask: NDArray[np.bool_] = (behind >= 0) & (behind < packed[:, None])
    return mask


def visible_tokens(tokens: int, window: int | None) -> NDArray[np.bool_]:
    """Return bool [query, key]: which keys a query sees."""
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    return (distance >= 0) & (distance < (window or tokens))


def _softmax(scores: Array, visible: NDArray[np.bool_]) -> Array:
    scores = np.where(visible, scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    result: Array = (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
    return result
