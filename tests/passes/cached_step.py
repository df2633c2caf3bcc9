"""Running the functions that QuantizeKVCache makes, step by step, and what NumPy says of each step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import tvm
from rotquant_tvm.passes.fuse_decode_rotation import FuseDecodeRotation
from rotquant_tvm.passes.fuse_prefill_rotation import FusePrefillRotation
from rotquant_tvm.passes.fuse_row_rotation import FuseRowRotation
from rotquant_tvm.passes.hoist_rotation import HoistRotation
from rotquant_tvm.passes.kv_kernels import kernel_of
from rotquant_tvm.passes.lower_kv_ops import LowerKVOps
from rotquant_tvm.passes.quantize_kv_cache import QuantizeKVCache
from tvm import relax

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import TileLayout
from rotquant_tvm.formats.centre import centre_words, decode_centre
from rotquant_tvm.kv_cache_config import KVCacheConfig

from ..ops.reference import unpack_words
from .tiny_model import VOCAB, TinyModel

CAPACITY = 96
CASES = {
    "plain": (TinyModel(), "hurwitz3", "1=q8_0/iso3"),
    "policy": (TinyModel(head_dim=64), "hurwitz3:ip/iso4,sinks=3,recent=2,center=32", "0=q8_0/hurwitz2"),
    "policy-window": (TinyModel(window=29), "iso3/turbo2,sinks=1,recent=5", "0=f16"),
    "mixed-window": (
        TinyModel(heads=3, kv_heads=1, head_dim=64, window=11, softcap=0.9),
        "iso3/planar2",
        "0=f16/turbo2:mse",
    ),
}
"""Model, formats and layer overrides whose numbers are followed through all passes."""


CENTRE_WORDS = {centre_words(model.head_dim) for model, *_ in CASES.values()}


def stages(model: TinyModel, config: KVCacheConfig) -> dict[str, tvm.IRModule]:
    """The module after each pass."""
    with tvm.target.Target("llvm"):
        quantized = QuantizeKVCache(config)(model.module())
        hoisted = HoistRotation()(quantized)
        lowered = LowerKVOps()(hoisted)
        fused = FuseDecodeRotation(tvm.target.Target("llvm"))(lowered)
        both = FusePrefillRotation(tvm.target.Target("llvm"))(fused)
        rows = FuseRowRotation(tvm.target.Target("llvm"))(both)
        made = {"quantize": quantized, "hoist": hoisted, "lower": lowered, "fuse": fused, "fuse-prefill": both}
        return {**made, "fuse-rows": rows}


def operators(mod: tvm.IRModule, name: str) -> list[str]:
    """The project's operators that a function calls, in order."""
    values = [binding.value for block in mod[name].body.blocks for binding in block.bindings]
    return [kernel[0] for value in values if (kernel := kernel_of(mod, value)) is not None]


@dataclass(frozen=True)
class Call:
    """One call of prefill (``new`` tokens of each row of ``ids``) or decode, and what it did."""

    ids: np.ndarray
    new: np.ndarray
    decode: bool
    before: list[np.ndarray]
    logits: np.ndarray
    after: list[np.ndarray]


class CachedStep:
    """A module's prefill and decode, compiled for this CPU."""

    def __init__(self, model: TinyModel, mod: tvm.IRModule) -> None:
        self.model = model
        with tvm.transform.PassContext(opt_level=3, disabled_pass=["RewriteDataflowReshape"]):
            executable = tvm.compile(mod, "llvm")
        self.vm = relax.VirtualMachine(executable, tvm.cpu())
        self.weights = [tvm.runtime.tensor(weight) for weight in model.weights]

    def create(self, batch: int, capacity: int = CAPACITY) -> list[np.ndarray]:
        """An empty cache, the lengths last."""
        return [tensor.numpy() for tensor in self.vm["create_kv_cache"](batch, capacity)]

    def call(self, cache: list[np.ndarray], ids: np.ndarray, new: np.ndarray | None) -> Call:
        """Prefill ``new`` tokens of each row, or decode if it is None, over a copy of ``cache``."""
        state = [tvm.runtime.tensor(array) for array in cache]
        counts = [] if new is None else [new]
        inputs = [tvm.runtime.tensor(np.asarray(x, np.int32)) for x in (ids, *counts)]
        logits = self.vm["decode" if new is None else "prefill"](*inputs, *state, *self.weights).numpy()
        taken = np.ones(len(ids), int) if new is None else np.asarray(new)
        return Call(ids, taken, new is None, cache, logits, [tensor.numpy() for tensor in state])

    @cached_property
    def conversation(self) -> list[Call]:
        """Two ragged chunks, one leaving a sequence alone, and decode steps across a tile's end."""
        rng = np.random.default_rng(3)
        calls, cache = [], self.create(3)
        for new in ([20, 7, 1], [9, 26, 0], None, None, None, None, [33, 9, 12], None, None):
            ids = rng.integers(0, VOCAB, (3, max(new or [1])))
            calls.append(self.call(cache, ids, new))
            cache = calls[-1].after
        return calls

    def replay(self, calls: list[Call]) -> list[Call]:
        """The same calls on the same caches: what one call differs in does not disturb the next."""
        return [self.call(c.before, c.ids, None if c.decode else c.new) for c in calls]


@cache
def compiled(case: str, stage: str) -> CachedStep:
    """A case after one of the passes."""
    model, *formats = CASES[case]
    return CachedStep(model, stages(model, KVCacheConfig.parse(*formats))[stage])


def check_case(case: str, before: str, after: str) -> None:
    """Assert that a pass kept a case's numbers, and that they are NumPy's."""
    model, *formats = CASES[case]
    calls = compiled(case, before).conversation
    replayed = compiled(case, after).replay(calls)
    check_replay(calls, replayed)
    for call in replayed:
        check_numbers(call, expected_logits(model, KVCacheConfig.parse(*formats), call))


def stored(model: TinyModel, config: KVCacheConfig, cache: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Keys and values of a cache, un-rotated: per layer k, v [batch, kv_heads, capacity, head_dim]."""
    found, arrays = [], iter(cache)
    for layer in range(model.layers):
        policy, words = config.layer_policy(layer, model.layers), next(arrays)
        codecs = config.codecs(layer, model.layers, model.head_dim)
        layout = TileLayout(codecs[0].format, codecs[1].format, model.head_dim)
        tiles = [c.decode_rotated(e) for c, e in zip(codecs, unpack_words(layout, words), strict=True)]
        if policy.center:
            tiles[0] = tiles[0] + np.repeat(decode_centre(next(arrays)), policy.center, axis=2)
        if policy.segmented:
            rotated = with_plain(policy, tiles, next(arrays), cache[-2], cache[-1], bool(model.window))
        else:
            rotated = unrolled(tiles, cache[-1]) if model.window else tiles
        found.append([c.unrotate(x) for c, x in zip(codecs, rotated, strict=True)])
    return found


def unrolled(tiles: list[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
    """Tokens in order, from rings; those that were given up are other ones."""
    places = np.arange(max(tiles[0].shape[2], lengths.max())) % tiles[0].shape[2]
    return [x[:, :, places] for x in tiles]


def with_plain(
    policy: CachePolicy,
    tiles: list[np.ndarray],
    plain: np.ndarray,
    packed: np.ndarray,
    lengths: np.ndarray,
    wraps: bool = False,
) -> list[np.ndarray]:
    """Tokens in order, from the tiles and the 16-bit rows [batch, kv_heads, 2, slots, head_dim]."""
    if wraps:
        tiles = unrolled(tiles, lengths)
    batch, heads, stored, head_dim = tiles[0].shape
    result = [np.zeros((batch, heads, policy.sinks + stored + policy.ring, head_dim)) for _ in range(2)]
    for role, out in enumerate(result):
        for b, length in enumerate(lengths):
            for place in range(length):
                number = place - policy.sinks
                if 0 <= number < packed[b]:
                    out[b, :, place] = tiles[role][b, :, number]
                else:
                    out[b, :, place] = plain[b, :, role, place if number < 0 else policy.sinks + number % policy.ring]
    return result


def expected_logits(model: TinyModel, config: KVCacheConfig, call: Call) -> np.ndarray:
    """NumPy's logits of a call: the past as the cache holds it, and in decode the new token too."""
    before, after = (stored(model, config, cache) for cache in (call.before, call.after))
    logits = np.full(call.logits.shape, np.nan)
    for b, (length, count) in enumerate(zip(call.before[-1], call.new, strict=True)):
        pasts = [[x[b, :, :length] for x in layer] for layer in (after if call.decode else before)]
        now = [[x[b, :, length : length + 1] for x in layer] for layer in after]
        if count:
            held = (lambda layer, _, now=now: now[layer]) if call.decode else None
            logits[b] = model.forward(call.ids[b, :count], pasts, held)[0]
    return logits


def check_numbers(actual: Call, logits: np.ndarray, atol: float = 1e-4) -> None:
    """Compare the logits of the sequences that got tokens."""
    taken = actual.new > 0
    np.testing.assert_allclose(actual.logits[taken], logits[taken], atol=atol)


def check_replay(calls: list[Call], others: list[Call]) -> None:
    """The same logits; the same caches but for codes at a boundary."""
    for call, other in zip(calls, others, strict=True):
        check_numbers(other, call.logits)
        for a, b in zip(call.after, other.after, strict=True):
            if a.dtype == np.float16:
                np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
            elif a.ndim == 4 and a.shape[-1] in CENTRE_WORDS:
                np.testing.assert_allclose(decode_centre(a), decode_centre(b), atol=2e-2)
            else:
                assert (a != b).sum() <= 2
