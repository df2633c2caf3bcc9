"""Codes of one device beside those of float64 arithmetic: how many differ, and how near to a boundary those values lie.

``python -m tests.determinism.device_codes [--target cuda] [--jobs N] [FORMAT …]`` prints a line per format and dtype.
Both operators that quantize are counted: ``quantize``, of plain vectors, and ``append``, into the tiles of a cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import tvm
from tvm.target import Target

from rotquant_tvm import ops
from rotquant_tvm.codegen import compile_kernel
from rotquant_tvm.formats import LINEAR_BLOCK, Codec, EncodedKV, KVFormat, TileLayout, sanitize
from rotquant_tvm.ops.site_shape import SiteShape
from rotquant_tvm.target import resolve_target

from ..schedules.cuda_targets import this_gpu

FORMATS = (
    *("hurwitz2", "hurwitz3", "hurwitz4", "hurwitz3:ip", "iso3", "planar3", "rotor3", "turbo3", "dense3"),
    *("q8_0", "q4_0", "turbo2.5", "hurwitz3+tcq"),
)
DTYPES = ("float16", "float32")
HEAD_DIM, SEED = 128, 20


@dataclass(frozen=True)
class Count:
    """Of ``codes`` codes, ``differing`` differ from float64's, the ``farthest`` of them so far from a boundary.

    That distance is in units of the codebook's axis (a rotated vector of norm 1; a step of a linear format). ``gains``
    and ``moved`` count the gains, and those that differ; ``repeated``: a second run gave the same bits.
    """

    operator: str
    codes: int
    differing: int
    farthest: float
    gains: int
    moved: int
    repeated: bool

    def __str__(self) -> str:
        share = f"{self.differing} of {self.codes} codes ({self.differing / self.codes:.1e})"
        gains = f"{self.moved} of {self.gains} gains" if self.gains else "no gains"
        return f"{self.operator}: {share}, {gains}, at most {self.farthest:.1e} off, repeated {self.repeated}"


def vectors(dtype: str, count: int, head_dim: int = HEAD_DIM, seed: int = SEED) -> np.ndarray:
    """Random vectors of many lengths, as keys have them."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, head_dim)) * rng.lognormal(sigma=1.0, size=(count, 1))).astype(dtype)


def distances(codec: Codec, x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """How far each value of x [n, d] lies from the nearest boundary of its codes; of a trellis, from the best path."""
    values = sanitize(x)
    if codec.format.codebook == "linear":
        gain = codec.encode(values).gain.astype(np.float64)
        scale = np.repeat(gain, LINEAR_BLOCK, axis=-1)[:, : codec.head_dim]
        ratio = np.divide(values, scale, out=np.zeros_like(values), where=scale != 0)
        return np.abs(ratio - np.floor(ratio) - 0.5)
    norm = np.sqrt((values * values).sum(-1))[:, None]
    unit = codec.rotation.apply(values) / np.where(norm > 0, norm, 1)
    if codec.format.codebook == "trellis":
        worse, best = (((unit - codec.codebook.decode(c)) ** 2).sum(-1) for c in (codes, codec.encode(values).codes))
        return np.repeat((worse - best)[:, None], codec.head_dim, axis=1)
    books = (codec.codebook.wide, codec.codebook.narrow) if codec.format.codebook == "split" else (codec.codebook,)
    parts = zip(np.split(unit, len(books), axis=-1), books, strict=True)
    return np.concatenate([np.abs(u[..., None] - book.boundaries).min(-1) for u, book in parts], axis=-1)


def counted(codec: Codec, x: np.ndarray, runs: Sequence[EncodedKV], operator: str) -> Count:
    """Compare what a device made of x, twice, with the exact encoding."""
    first, second = runs
    exact = codec.encode(x)
    differs = first.codes != exact.codes
    farthest = distances(codec, x, first.codes)[differs].max(initial=0)
    same = all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in _parts(first, second))
    moved = int((first.gain != exact.gain).sum())
    return Count(operator, differs.size, int(differs.sum()), float(farthest), exact.gain.size, moved, same)


def _parts(first: EncodedKV, second: EncodedKV) -> list[tuple[np.ndarray, np.ndarray]]:
    pairs = (first.codes, second.codes), (first.gain, second.gain)
    return [tuple(np.ascontiguousarray(part) for part in pair) for pair in pairs]


def quantized(codec: Codec, x: np.ndarray, target: Target) -> EncodedKV:
    """What the operator ``quantize`` makes of x."""
    return codec.compile(target).encode(x)


class Append:
    """The operator ``append`` for keys and values of one codec."""

    def __init__(self, codec: Codec, dtype: str, target: Target) -> None:
        name, self.codec = codec.format.name, codec
        self.layout = TileLayout(codec.format, codec.format, codec.head_dim)
        self.device = tvm.cuda(0) if target.kind.name == "cuda" else tvm.cpu()
        shape = SiteShape(name, name, 1, 1, codec.head_dim, 1.0, None, dtype)
        func = shape.attach(ops.append(codec, codec, 1, dtype, ops.Axes.of(target)))
        self.kernel = compile_kernel(func, target, aligned=True, tuned=False)

    def __call__(self, x: np.ndarray) -> list[EncodedKV]:
        """What it writes for x [n, d], as keys and as values."""
        count, rows, lengths = len(x), x.reshape(1, 1, *x.shape), np.array([len(x)], np.int32)
        words = np.zeros((1, 1, -(-count // 32), self.layout.tile_bytes // 4), np.uint32)
        arrays = (words, rows, rows, self.codec.coefficients, self.codec.coefficients, lengths, lengths)
        tensors = [tvm.runtime.tensor(array, self.device) for array in arrays]
        self.kernel(*tensors)
        parts = self.layout.unpack(np.ascontiguousarray(tensors[0].numpy()).view(np.uint8))
        return [EncodedKV(*(a.reshape(-1, a.shape[-1])[:count] for a in (p.codes, p.gain))) for p in parts]


def compare(text: str, dtype: str, kind: str, count: int, head_dim: int = HEAD_DIM) -> list[Count]:
    """Count for one format and dtype, on a device of a kind."""
    target = this_gpu() if kind == "cuda" else resolve_target("llvm")
    codec, x = KVFormat.parse(text).codec(head_dim, SEED), vectors(dtype, count, head_dim)
    append = Append(codec, dtype, target)
    written = [append(x) for _ in range(2)]
    runs = {
        "quantize": [quantized(codec, x, target) for _ in range(2)],
        **{f"append {role}": [both[n] for both in written] for n, role in enumerate("KV")},
    }
    return [counted(codec, x, pair, operator) for operator, pair in runs.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", default=FORMATS)
    parser.add_argument("--target", choices=("cuda", "llvm"), default="cuda")
    parser.add_argument("--count", type=int, default=16384, help="vectors of each format and dtype")
    parser.add_argument("--jobs", type=int, default=1)
    chosen = parser.parse_args(argv)
    cases = [(text, dtype) for text in chosen.formats for dtype in DTYPES]
    with ProcessPoolExecutor(chosen.jobs, mp_context=get_context("spawn")) as pool:
        work = [pool.submit(compare, *case, chosen.target, _size(case[0], chosen.count)) for case in cases]
        for (text, dtype), part in zip(cases, work, strict=True):
            for count in part.result():
                print(f"{chosen.target} {text} {dtype} {count}", flush=True)


def _size(text: str, count: int) -> int:
    """A trellis is searched slowly in NumPy."""
    return count // 16 if "+tcq" in text else count


if __name__ == "__main__":
    main()
