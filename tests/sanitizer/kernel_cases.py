"""The kernels of a cache at small, odd sizes: what the sanitizers run.

Sequences of many tiles, of a token and of none; chunks that begin and end inside tiles, or go on past the capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import tvm
from rotquant_tvm.schedules.knobs import kernel_for, with_knobs
from tvm.target import Target

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import NO_POLICY, CachePolicy
from rotquant_tvm.formats import EncodedKV, KVFormat
from rotquant_tvm.formats.centre import centre_words
from rotquant_tvm.ops.site_shape import SiteShape
from rotquant_tvm.window_ring import WindowRing

from ..ops.cases import Case
from ..ops.reference import coefficients, layout_of

SCALE, BATCH = 0.09, 3
PRESET = CachePolicy(sinks=4, recent=8, center=64)
Build = Callable[[Target], tvm.tirx.PrimFunc]


@dataclass(frozen=True)
class Launch:
    """``build`` makes a function for a target; ``arrays`` are its arguments, counters apart.

    The last ``outputs`` arrays are written without being read; the others that a kernel writes, it updates.
    """

    build: Build
    arrays: list[np.ndarray]
    outputs: int = 0


@dataclass(frozen=True)
class KernelCase:
    """One launch, which ``launch`` prepares. ``cuda``: there is no definition of it for CPUs."""

    family: str
    name: str
    launch: Callable[[], Launch]
    cuda: bool = False

    @property
    def symbol(self) -> str:
        """The function's name, which a sanitizer's report shows."""
        return f"{self.family}__{self.name}"


def case(
    family: str, name: str, prepare: Callable[..., Launch], *arguments: Any, cuda=False, **options: Any
) -> KernelCase:
    """A case whose launch is ``prepare(name, *arguments, **options)``."""
    return KernelCase(family, name, partial(prepare, name, *arguments, **options), cuda)


def numbers(*key: Any) -> np.random.Generator:
    """Random numbers of a case's own."""
    return np.random.default_rng(sum(str(key).encode()))


def chosen(definition: Callable[..., Any], shape: SiteShape | None = None, **knobs: int) -> Build:
    """What the compiler takes for a definition: the kernel laid out by hand, where there is one."""

    def build(target: Target) -> tvm.tirx.PrimFunc:
        func = definition(axes=ops.Axes.of(target))
        func = func if shape is None else shape.attach(func)
        func = with_knobs(func, knobs if target.kind.name == "cuda" else {})
        return kernel_for(func, target) or func

    return build


def site(case: Case, dtype: str, policy: CachePolicy = NO_POLICY, window: int | None = None, **more: Any) -> SiteShape:
    """The shape of an attention site that has a case's formats and heads."""
    names = (codec.format.name for codec in case.codecs)
    sizes = case.heads, case.kv_heads, case.head_dim
    return SiteShape(*names, *sizes, SCALE, window, dtype, policy=policy.name, **more)


def packed_cache(rng: Any, case: Case, lead: tuple[int, ...], held: np.ndarray) -> np.ndarray:
    """Tiles uint32 [*lead, words] of any codes and finite gains; behind ``held`` tokens of a sequence, any bits."""
    layout, d = layout_of(case.codecs), case.head_dim

    def encoded(found: Any) -> EncodedKV:
        size = (*lead, 32, d)
        gain = rng.lognormal(size=(*size[:-1], found.gains_per_vector(d))).astype(np.float16)
        if found.bits == 16:
            return EncodedKV(KVFormat.parse(found.name).codec(d).encode(rng.standard_normal(size)).codes, gain)
        most = np.where(np.arange(d) < found.plane_dims(d), 2 ** (found.bits + 1), 2**found.bits)
        return EncodedKV(rng.integers(0, most, size).astype(np.uint8), gain)

    words = np.ascontiguousarray(layout.pack(*(encoded(codec.format) for codec in case.codecs))).view(np.uint32)
    for b, count in enumerate(held):
        words[b, :, -(-int(count) // 32) :] = rng.integers(0, 2**32, words[b, :, -(-int(count) // 32) :].shape)
    return words


def cache_arrays(rng: Any, case: Case, lengths: Any, tiles: int, policy: CachePolicy = NO_POLICY) -> list[np.ndarray]:
    """The arrays of ``segment_arguments``, filled; tiles behind the lengths are random bits."""
    cache = packed_cache(rng, case, (len(lengths), case.kv_heads, tiles), lengths)
    if not policy.segmented:
        return [cache]
    arrays, lead = [cache], (len(lengths), case.kv_heads)
    if policy.center:
        words = centre_words(case.head_dim)
        centre = rng.integers(0, 2**32, (*lead, max(1, tiles * 32 // policy.center), words), dtype=np.uint32)
        centre[..., -1] = np.float32(0.01).view(np.uint32)
        arrays.append(centre)
    arrays.append(rng.standard_normal((*lead, 2, policy.slots, case.head_dim)).astype(np.float16))
    packed = policy.packed_after(np.zeros(len(lengths), np.int32), lengths, chunk=False)
    return [*arrays, np.minimum(packed, 32 * tiles).astype(np.int32)]


def counts(*values: int) -> np.ndarray:
    """int32."""
    return np.array(values, np.int32)


def normal(rng: Any, dtype: str, *shape: int) -> np.ndarray:
    """Standard normal numbers."""
    return rng.standard_normal(shape).astype(dtype)


def append_launch(name: str, pair: str, d: int, dtype: str, new: Any, before: Any, tiles: int, window=None) -> Launch:
    """``append`` of ``new`` tokens to sequences of ``before``."""
    case, rng = Case(pair, d, 2, 2), numbers(name, pair)
    shape = site(case, dtype, window=window)
    tiles = WindowRing(window).tiles if window else tiles
    cache = packed_cache(rng, case, (len(new), 2, tiles), counts(*before))
    k, v = (normal(rng, dtype, len(new), 2, max(1, *new), d) for _ in "kv")
    data = [codec.coefficients for codec in case.codecs]
    return Launch(
        chosen(lambda axes: ops.append(*case.codecs, 2, dtype, axes, wraps=shape.wraps), shape),
        [cache, k, v, *data, counts(*before) + counts(*new), counts(*new)],
    )


def decode_launch(
    name: str, case: Case, dtype: str, policy=NO_POLICY, window=None, raw=False, longest=1021, **knobs
) -> Launch:
    """``attention_decode`` over sequences of several splits, of one token and of none."""
    rng, lengths = numbers(name), counts(longest, 33, 0)
    shape = site(case, dtype, policy, window, rotated=raw)
    tiles = WindowRing(window, policy).tiles if window else longest // 32 + 5
    arrays = cache_arrays(rng, case, lengths, tiles, policy)
    q = normal(rng, dtype, BATCH, 1, case.heads, case.head_dim)
    key, value = case.codecs
    data = [coefficients(key.rotation), coefficients(value.inverse_rotation)] if raw else []

    def definition(axes: ops.Axes) -> tvm.tirx.PrimFunc:
        sizes = case.heads, case.kv_heads, SCALE, dtype
        return ops.attention_decode(key, value, *sizes, axes, splits=3, window=window, policy=policy, rotated=raw)

    return Launch(
        chosen(definition, shape, **knobs),
        [q, *arrays, lengths, *data, np.empty_like(q)],
        outputs=1,
    )


def prefill_launch(name: str, case: Case, dtype: str, policy=NO_POLICY, window=None, raw=False) -> Launch:
    """``attention_prefill`` of chunks of 37 rows, behind a past of several tiles and of none."""
    rng, past, new = numbers(name), counts(131, 0, 7), counts(37, 5, 0)
    shape = site(case, dtype, policy, window, chunk=True, rotated=raw)
    tiles = WindowRing(window, policy).tiles if window else 8
    arrays = cache_arrays(rng, case, past, tiles, policy)
    q = normal(rng, dtype, BATCH, 37, case.heads, case.head_dim)
    k, v = (normal(rng, dtype, BATCH, case.kv_heads, 37, case.head_dim) for _ in "kv")

    def definition(axes: ops.Axes) -> tvm.tirx.PrimFunc:
        sizes = case.heads, case.kv_heads, SCALE, dtype
        return ops.attention_prefill(*case.codecs, *sizes, axes, window=window, policy=policy, rotated=raw)

    turned = [codec.rotation.apply(np.eye(case.head_dim)).T.astype(dtype) for codec in case.codecs] if raw else []
    rest = [past + new, new, *turned, np.empty_like(q)]
    return Launch(chosen(definition, shape), [q, k, v, *arrays, *rest], outputs=1)


def flush_launch(name: str, case: Case, dtype: str, policy: CachePolicy, seq: int, window=None) -> Launch:
    """``flush`` of rings that ``seq`` new tokens push full."""
    rng, past = numbers(name), counts(75, 3, 200)
    new = np.minimum(counts(seq, seq - 1, seq // 2), seq)
    tiles = WindowRing(window, policy).tiles if window else policy.packed_tiles(200 + seq)
    cache, *middle, plain, before = cache_arrays(rng, case, past, tiles, policy)
    packed = np.maximum(before, policy.packed_after(before, past + new, chunk=seq > 1))
    k, v = (normal(rng, dtype, BATCH, case.kv_heads, seq, case.head_dim) for _ in "kv")

    def definition(axes: ops.Axes) -> tvm.tirx.PrimFunc:
        codecs = (codec.in_rotated_basis() for codec in case.codecs)
        return ops.flush(*codecs, case.kv_heads, dtype, policy, axes, wraps=bool(window))

    shape = site(case, dtype, policy, window)
    return Launch(chosen(definition, shape), [cache, *middle, plain, k, v, before, packed, past + new, new])


def append_plain_launch(name: str, dtype: str, policy: CachePolicy, seq: int) -> Launch:
    """``append_plain`` of fewer tokens than there are slots, or more."""
    rng, case = numbers(name), Case("hurwitz3", 80, 2, 2)
    past, new = counts(0, 75, 9), counts(seq, seq // 2, 0)
    packed = policy.packed_after(np.zeros(BATCH, np.int32), past + new, chunk=seq > 1)
    plain = normal(rng, "float16", BATCH, 2, 2, policy.slots, 80)
    k, v = (normal(rng, dtype, BATCH, 2, seq, 80) for _ in "kv")
    cache = packed_cache(rng, case, (BATCH, 2, 2), counts(0, 0, 0))
    words = layout_of(case.codecs).tile_bytes // 4
    shape = SiteShape("f16", "f16", 2, 2, 80, 1.0, None, dtype, policy=policy.name)
    return Launch(
        chosen(lambda axes: ops.append_plain(2, 80, words, dtype, policy, axes), shape),
        [plain, k, v, packed, past + new, new, cache],
    )


def append_turned_launch(name: str, case: Case, dtype: str, policy: CachePolicy = PRESET) -> Launch:
    """``append_plain`` of single tokens that it rotates: the first, one that goes round the ring, and none."""
    rng, past, new = numbers(name), counts(0, 75, 9), counts(1, 1, 0)
    heads, d, words = case.kv_heads, case.head_dim, layout_of(case.codecs).tile_bytes // 4
    packed = policy.packed_after(np.zeros(BATCH, np.int32), past + new, chunk=False)
    plain = normal(rng, "float16", BATCH, heads, 2, policy.slots, d)
    k, v = (normal(rng, dtype, BATCH, heads, 1, d) for _ in "kv")
    cache = packed_cache(rng, case, (BATCH, heads, 2), counts(0, 0, 0))
    turns = tuple(codec.rotation.structure for codec in case.codecs)
    data = [coefficients(codec.rotation) for codec in case.codecs]
    definition = partial(ops.append_plain, heads, d, words, dtype, policy, rotations=turns)
    return Launch(chosen(definition, site(case, dtype, policy)), [plain, k, v, *data, packed, past + new, new, cache])


def kv_cases() -> list[KernelCase]:
    """The kernels of a cache."""
    main, ring = Case("hurwitz3:ip/hurwitz3", 128, 8, 2), replace(PRESET, recent=9)
    mixed, trellis = Case("iso4/planar2", 80, 6, 2), Case("hurwitz3+tcq", 64, 6, 2)
    long: dict[str, Any] = {"longest": 34200}
    apart: dict[str, Any] = {"longest": 8600, "least": 1, "warps": 2}
    return [
        case("append", "chunk", append_launch, "hurwitz3:ip/hurwitz3", 128, "float16", (77, 0, 1), (45, 3, 31), 4),
        case("append", "chunk_past_the_end", append_launch, "hurwitz3", 64, "float16", (70, 9), (40, 60), 2),
        case("append", "chunk_float32", append_launch, "iso4/planar2", 80, "float32", (45, 33, 9), (3, 31, 0), 3),
        case("append", "chunk_linear", append_launch, "q8_0/q4_0", 80, "float16", (45, 33, 9), (3, 31, 0), 3),
        case("append", "chunk_half", append_launch, "f16/bf16", 48, "float16", (45, 33, 9), (3, 31, 0), 3),
        case("append", "chunk_dense", append_launch, "dense3/dense1", 96, "float16", (45, 33), (3, 31), 3),
        case("append", "chunk_split", append_launch, "turbo2.5/dense3.5", 64, "float16", (45, 33), (3, 31), 3),
        case("append", "chunk_trellis", append_launch, "hurwitz3+tcq", 64, "float16", (35, 2), (3, 31), 3),
        case("append", "token", append_launch, "hurwitz3:ip/hurwitz3", 128, "float16", (1, 1, 0), (45, 0, 31), 2),
        case("append", "token_float32", append_launch, "rotor3/q8_0", 80, "float32", (1, 1, 0), (45, 0, 31), 2),
        case("append", "token_past_the_end", append_launch, "hurwitz3", 64, "float16", (1, 1), (64, 63), 2),
        case("append", "ring", append_launch, "hurwitz3", 64, "float16", (130, 1), (45, 200), 0, window=40),
        case("append_plain", "few", append_plain_launch, "float16", PRESET, 5),
        case("append_plain", "many", append_plain_launch, "float16", PRESET, 131),
        case("append_plain", "float32", append_plain_launch, "float32", CachePolicy(sinks=7), 9),
        case("append_plain", "token", append_turned_launch, main, "float16"),
        case("append_plain", "token_float32", append_turned_launch, Case("rotor3/q8_0", 80, 3, 3), "float32"),
        case("append_plain", "token_dense", append_turned_launch, Case("turbo3/dense3", 64, 2, 2), "float16"),
        case("decode", "main", decode_launch, main, "float16", least=1, warps=4),
        case("decode", "defaults", decode_launch, main, "float16"),
        case("decode", "raw_queries", decode_launch, main, "float16", raw=True, cuda=True, least=1),
        case("decode", "float32", decode_launch, Case("iso3/rotor2", 80, 11, 1), "float32", least=1),
        case("decode", "linear", decode_launch, Case("q8_0/q4_0", 80, 6, 2), "float16"),
        case("decode", "half", decode_launch, Case("f16/hurwitz3", 96, 5, 1), "float16"),
        case("decode", "wide", decode_launch, Case("hurwitz4", 256, 16, 1), "float16"),
        case("decode", "policy", decode_launch, main, "float16", PRESET, least=1),
        # Splits of several tiles a warp, and beside them blocks that have the rows in 16 bits alone.
        case("decode", "policy_apart", decode_launch, main, "float16", PRESET, longest=4321, least=1, warps=1),
        case("decode", "apart_two_warps", decode_launch, main, "float16", PRESET, **apart),
        case("decode", "apart_four_warps", decode_launch, mixed, "float16", PRESET, longest=17000, least=1, warps=4),
        case("decode", "apart_raw", decode_launch, main, "float16", PRESET, raw=True, cuda=True, **apart),
        case("decode", "apart_trellis", decode_launch, trellis, "float16", PRESET, **apart),
        case("decode", "apart_defaults", decode_launch, main, "float16", PRESET, **long),
        case("decode", "apart_defaults_raw", decode_launch, main, "float16", PRESET, raw=True, cuda=True, **long),
        case("decode", "policy_raw", decode_launch, main, "float16", PRESET, raw=True, cuda=True),
        case("decode", "window", decode_launch, main, "float16", window=500),
        case("decode", "policy_window", decode_launch, main, "float16", ring, window=300),
        case("decode", "trellis", decode_launch, trellis, "float16"),
        case("decode", "trellis_policy", decode_launch, trellis, "float16", PRESET),
        case("prefill", "main", prefill_launch, main, "float16"),
        case("prefill", "policy", prefill_launch, main, "float16", PRESET),
        case("prefill", "raw", prefill_launch, main, "float16", raw=True),
        case("prefill", "raw_policy", prefill_launch, main, "float16", PRESET, raw=True),
        case("prefill", "window", prefill_launch, mixed, "float16", window=40),
        case("prefill", "linear", prefill_launch, Case("q8_0/q4_0", 80, 6, 2), "float16"),
        case("prefill", "half", prefill_launch, Case("f16/bf16", 64, 4, 4), "float16"),
        case("prefill", "trellis", prefill_launch, trellis, "float16"),
        case("prefill", "float32", prefill_launch, mixed, "float32"),
        case("flush", "chunk", flush_launch, main, "float16", PRESET, 150),
        case("flush", "token", flush_launch, main, "float16", PRESET, 1),
        case("flush", "uncentred", flush_launch, mixed, "float32", CachePolicy(recent=9), 70),
        case("flush", "linear", flush_launch, Case("q8_0/rotor3", 80, 2, 2), "float16", PRESET, 70),
        case("flush", "ring", flush_launch, main, "float16", PRESET, 150, window=100),
    ]
