"""Nearest neighbours by inner product among vectors kept in a KV format: no training, and any order of arrival.

``codec.compile(target).index(vectors)`` encodes them; ``search`` scans all tiles with the score kernel. Vectors are
compared by inner product (normalize them for the cosine); formats with the ip gain (``turbo3:ip``) estimate it without
bias, and so do those with a sketch, at more error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from .codegen import compile_kernel
from .errors import UsageError
from .formats import TOKENS, Codec, EncodedKV, KeyLayout
from .ops.axes import Axes
from .ops.encode_tiles import encode_tiles
from .ops.score import feature_count, query_features, score
from .ops.tensor_kinds import TensorKind, kind_of

QUERIES = 256
"""Queries whose scores are in memory at a time."""


class SearchKernels:
    """The kernels that indexes of a codec share, each compiled for ``target`` when it is first needed."""

    def __init__(self, codec: Codec, target: tvm.target.Target) -> None:
        self.codec, self.target = codec, target
        self.device = tvm.runtime.device("cuda" if target.kind.name == "cuda" else "cpu", 0)
        self.coefficients = tvm.runtime.tensor(codec.coefficients, self.device) if self.device.exist else None
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def get(self, operator: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
        """Return the compiled ``operator(codec, *arguments, axes)``."""
        key = (operator, *arguments)
        if key not in self._compiled:
            func = operator(self.codec, *arguments, Axes.of(self.target))
            self._compiled[key] = compile_kernel(func, self.target, aligned=True)
        return self._compiled[key]


class VectorIndex:
    """Encoded vectors [n, d], to be searched by inner product; ``CompiledCodec.index`` makes it.

    ``tiles`` is a TVM tensor uint32 [⌈n/32⌉, tile_bytes/4], laid out as ``KeyLayout`` says.
    """

    def __init__(self, kernels: SearchKernels, vectors: Any) -> None:
        kind, vectors = kind_of(vectors, kernels.device)
        codec = kernels.codec
        shape = tuple(int(size) for size in vectors.shape)
        if len(shape) != 2 or shape[1] != codec.head_dim:
            raise UsageError(f"vectors have shape {list(shape)}; an index takes [n, {codec.head_dim}]")
        self._kernels, self.size = kernels, shape[0]
        self.layout = KeyLayout(codec.format, codec.head_dim)
        tiles = -(-self.size // TOKENS)
        blank = np.zeros((tiles, self.layout.tile_bytes // 4), np.uint32)
        self.tiles = tvm.runtime.tensor(blank, kernels.device)
        vectors = kind.floats(vectors)
        if self.size:
            encode = kernels.get(encode_tiles, kind.dtype(vectors))
            encode(kind.argument(vectors, shape), kernels.coefficients, self.tiles)

    def __len__(self) -> int:
        return self.size

    @property
    def codec(self) -> Codec:
        """The codec that encoded the vectors."""
        return self._kernels.codec

    @property
    def nbytes(self) -> int:
        """Bytes of the stored vectors: codes, gains and sketches, the last tile counted whole."""
        return math.prod(int(size) for size in self.tiles.shape) * 4

    def encoded(self) -> EncodedKV:
        """Return the vectors as ``Codec.encode`` does: codes [n, d] and gain [n, gains]."""
        parts = self.layout.unpack(self.tiles.numpy().view(np.uint8))
        rows = len(parts.codes) * TOKENS
        codes = parts.codes.reshape(rows, self.codec.head_dim)
        return EncodedKV(codes[: self.size], parts.gain.reshape(rows, self.codec.gains_per_vector)[: self.size])

    def scores(self, queries: Any) -> Any:
        """Return the estimated inner products of queries [m, d] with all vectors, float32 [m, n].

        Takes and returns NumPy arrays, torch tensors or TVM tensors. Raises ``UsageError`` for another shape.
        """
        kind, queries = kind_of(queries, self._kernels.device)
        shape = tuple(int(size) for size in queries.shape)
        if len(shape) != 2 or shape[1] != self.codec.head_dim:
            raise UsageError(f"queries have shape {list(shape)}; the index takes [m, {self.codec.head_dim}]")
        raw = self._scores(kind, kind.floats(queries), shape)
        if kind.name == "numpy":
            return (np.from_dlpack(raw) if raw.device.type == "cpu" else raw.numpy())[:, : self.size]
        if kind.name == "tvm":  # has no slices
            return tvm.runtime.tensor(raw.numpy()[:, : self.size], raw.device)
        return raw[:, : self.size]

    def search(self, queries: Any, k: int = 10) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return ids and scores [m, min(k, n)] of the vectors with the largest inner products, best first.

        ``queries`` are [m, d], as ``scores`` takes them; the results are NumPy arrays. Raises ``UsageError`` for a
        ``k`` below 1.
        """
        if k < 1:
            raise UsageError(f"k is {k}; ask for 1 neighbour or more")
        k = min(k, self.size)
        rows = int(queries.shape[0])
        ids, best = np.empty((rows, k), np.int64), np.empty((rows, k), np.float32)
        if isinstance(queries, tvm.runtime.Tensor):  # has no slices
            queries = queries.numpy()
        for first in range(0, rows, QUERIES):
            part = slice(first, min(first + QUERIES, rows))
            found = self.scores(queries[part])
            ids[part], best[part] = _largest(found if isinstance(found, np.ndarray) else found.cpu().numpy(), k)
        return ids, best

    def _scores(self, kind: TensorKind, queries: Any, shape: tuple[int, ...]) -> Any:
        kernels = self._kernels
        # Vector kernels want memory that is aligned as TVM's and torch's is, which NumPy's need not be.
        empty = partial(tvm.runtime.empty, device=kind.device) if kind.name == "numpy" else kind.empty
        out = empty((shape[0], TOKENS * int(self.tiles.shape[0])), "float32")
        if not shape[0] or not self.size:
            return out
        features = empty((shape[0], feature_count(self.codec)), "float32")
        kernels.get(query_features, kind.dtype(queries))(kind.argument(queries, shape), kernels.coefficients, features)
        kernels.get(score)(features, self.tiles, out)
        return out


def _largest(scores: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and values of the k largest of each row, in descending order."""
    first = scores.shape[1] - k
    ids = np.argpartition(scores, first, axis=1)[:, first:] if first else np.argsort(scores, axis=1)
    values = np.take_along_axis(scores, ids, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
