"""Artifacts and saved caches that need no compiler: their library is a file of bytes."""

from __future__ import annotations

import numpy as np
import tvm

from rotquant_tvm.cache_policy import NO_POLICY
from rotquant_tvm.runtime import write_artifact
from rotquant_tvm.runtime.cache_arrays import CacheArrays
from rotquant_tvm.runtime.cache_file import read_cache_file, save_cache
from rotquant_tvm.runtime.cache_info import INFO_VERSION, LAYOUT_VERSION

LAYER = {"kv_heads": 1, "head_dim": 32, "k": "f16", "v": "f16", "tile_bytes": 4096}
INFO = {"version": INFO_VERSION, "layout_version": LAYOUT_VERSION, "layers": [LAYER], "vocab_size": 8}
INFO |= {"max_position": 4096, "dtype": "float32", "weights": ["weight_0000"]}
IDENTITY = "0" * 64
WEIGHT_COUNT = 200_000


def artifact(path, version: int, size: int = WEIGHT_COUNT):
    """Write an artifact with so many weights; every file of it tells the version."""
    weights = {"weight_0000": np.full(size, version, np.float32)}
    library = f"library {version}".encode() * 1000
    return write_artifact(path, library, weights, kv_cache_info=INFO, target="llvm", report={"version": version})


def cache(tokens: int, version: int = 0) -> CacheArrays:
    """A cache of one layer that holds so many tokens."""
    tiles = -(-tokens // 32)
    layer = tvm.runtime.tensor(np.full((1, 1, tiles, 1024), version, np.uint32))
    return CacheArrays([layer, tvm.runtime.tensor(np.array([tokens], np.int32))], tvm.cpu(), NO_POLICY)


def save(path, tokens: int, version: int = 0) -> None:
    """Save such a cache."""
    save_cache(path, cache(tokens, version), cache(tokens), IDENTITY)


def saved_version(path) -> int:
    """Read a saved cache and return its version; every element must have it."""
    stored = read_cache_file(path, IDENTITY)
    empty = cache(stored.longest)
    stored.fill(empty)
    values = np.unique(empty.layers[0].numpy())
    assert len(values) == 1
    return int(values[0])
