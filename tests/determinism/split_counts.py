"""Decode attention in one split and in many: how far apart its results are, and whether they repeat bit for bit.

``python -m tests.determinism.split_counts [--target cuda] [--jobs N]`` prints a line per kind of cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import tvm
from rotquant_tvm.schedules.knobs import with_knobs

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import NO_POLICY, CachePolicy
from rotquant_tvm.codegen import compile_kernel
from rotquant_tvm.ops.site_shape import SiteShape
from rotquant_tvm.target import resolve_target

from ..ops.cases import Case
from ..ops.reference import layout_of
from ..schedules.cuda_targets import this_gpu

SCALE, BATCH, TILES = 0.09, 2, 256
SPLITS = (1, 2, 3, 7, 16, 61)
PRESET = CachePolicy(sinks=4, recent=64, center=64)


class SplitCase(NamedTuple):
    """Formats, heads and policy of a cache."""

    case: Case
    policy: CachePolicy = NO_POLICY


CASES = (
    SplitCase(Case("hurwitz3:ip/hurwitz3", 128, 8, 2)),
    SplitCase(Case("hurwitz3:ip/hurwitz3", 128, 8, 2), PRESET),
    SplitCase(Case("hurwitz3+tcq", 128, 8, 2)),
    SplitCase(Case("iso4/planar2", 80, 6, 2)),
    SplitCase(Case("q8_0", 128, 8, 2)),
    SplitCase(Case("f16", 64, 4, 2)),
)


def arguments(case: SplitCase, tiles: int) -> list[np.ndarray]:
    """Queries, cache and lengths: keys and values of norm √d, sequences of about all of the tiles and of few."""
    rng, (sizes, policy) = np.random.default_rng(7), case
    codecs, d = [codec.in_rotated_basis() for codec in sizes.codecs], sizes.head_dim
    encoded = [codec.encode(rng.standard_normal((BATCH, sizes.kv_heads, tiles, 32, d))) for codec in codecs]
    cache = [np.ascontiguousarray(layout_of(codecs).pack(*encoded)).view(np.uint32)]
    lengths = np.array([32 * tiles - 19, 77], np.int32)
    q = rng.standard_normal((BATCH, 1, sizes.heads, d)).astype(np.float32)
    if policy.segmented:
        centre = rng.integers(
            0, 2**32, (BATCH, sizes.kv_heads, tiles * 32 // policy.center, d // 4 + 1), dtype=np.uint32
        )
        centre[..., -1] = np.float32(0.004).view(np.uint32)
        plain = rng.standard_normal((BATCH, sizes.kv_heads, 2, policy.slots, d)).astype(np.float16)
        packed = policy.packed_after(np.zeros(BATCH, np.int32), lengths, chunk=False)
        cache += [centre, plain, packed.astype(np.int32)]
    return [q, *cache, lengths]


def attend(case: SplitCase, splits: int, kind: str, tiles: int = TILES) -> tuple[np.ndarray, bool]:
    """The output in so many splits, and whether three runs agree bit for bit."""
    sizes, policy = case
    target = this_gpu() if kind == "cuda" else resolve_target("llvm")
    device = tvm.cuda(0) if kind == "cuda" else tvm.cpu()
    names = [codec.format.name for codec in sizes.codecs]
    shape = SiteShape(*names, sizes.heads, sizes.kv_heads, sizes.head_dim, SCALE, None, "float32", policy=policy.name)
    func = ops.attention_decode(
        *sizes.codecs, sizes.heads, sizes.kv_heads, SCALE, "float32", ops.Axes.of(target), splits=splits, policy=policy
    )
    func = replace(shape, splits=splits).attach(func)
    if kind == "cuda":  # as many splits as a launch of so many blocks has
        blocks = splits * BATCH * sizes.kv_heads
        func = with_knobs(func, {"warps": 4, "least": 1, "splits": 64, "blocks": blocks})
    kernel = compile_kernel(func, target, aligned=True, tuned=False)
    arrays = arguments(case, tiles)
    results = []
    for _ in range(3):
        tensors = [tvm.runtime.tensor(x, device) for x in (*arrays, np.full_like(arrays[0], np.nan))]
        kernel(*tensors)
        results.append(tensors[-1].numpy())
    return results[0], all(np.array_equal(results[0], other) for other in results[1:])


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest distance of two output vectors, relative to the one's norm."""
    distance, norm = (np.linalg.norm(x.astype(np.float64), axis=-1) for x in (other - one, one))
    return float((distance / norm).max())


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=("cuda", "llvm"), default="cuda")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the caches")
    parser.add_argument(
        "--splits", type=int, nargs="+", default=SPLITS, help="the first is what others are compared to"
    )
    chosen = parser.parse_args(argv)
    with ProcessPoolExecutor(chosen.jobs, mp_context=get_context("spawn")) as pool:
        work = {
            case: [pool.submit(attend, case, n, chosen.target) for n in chosen.splits] for case in CASES[: chosen.cases]
        }
        for case, parts in work.items():
            outputs = [part.result() for part in parts]
            apart = [
                f"{n}: {difference(outputs[0][0], out):.1e}" for n, (out, _) in zip(chosen.splits, outputs, strict=True)
            ]
            same, policy = all(repeated for _, repeated in outputs), case.policy.name or "no policy"
            said = f"from {chosen.splits[0]} split, {', '.join(apart[1:])}; repeated {same}"
            print(f"{chosen.target} {case.case} {policy}: {said}", flush=True)


if __name__ == "__main__":
    main()
