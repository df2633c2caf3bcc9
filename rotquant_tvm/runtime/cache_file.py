"""A packed cache on disk: what a session holds, saved and taken up again, so that a prefix is computed once.

The file is a safetensors file: the layers' arrays as they lie in memory, cut to the tiles in use, and the counts per
sequence. Its metadata name the format, the library that the arrays are of, and a SHA-256 of every array.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open
from tvm.runtime import Tensor

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.durable import replace_file
from rotquant_tvm.errors import ArtifactError
from rotquant_tvm.runtime.cache_arrays import CacheArrays, capacity_for
from rotquant_tvm.staging import staging_folder, write_error

FORMAT, VERSION = "rotquant-tvm-cache", 1
_COUNTS = "counts"


def library_identity(info: Mapping[str, Any], weights: Sequence[Tensor]) -> str:
    """SHA-256 (hex) over ``kv_cache_info()`` and every weight; about a second per GB of weights.

    Which logits a library returns says nothing of its cache, and is left out.
    """
    stored = {key: value for key, value in info.items() if key != "every_logit"}
    digest = hashlib.sha256(json.dumps(stored, sort_keys=True).encode())
    for weight in weights:
        array = weight.numpy()
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(_bytes(array))
    return digest.hexdigest()


def save_cache(path: str | os.PathLike[str], cache: CacheArrays, used: CacheArrays, identity: str) -> None:
    """Write what ``cache`` holds to the file ``path``, which appears whole or not at all.

    ``used``: an empty cache of the same library whose capacity is the longest sequence; its shapes, the batch aside,
    say which part of each array is in use. Raises UsageError if the file cannot be written.
    """
    arrays = {
        f"layer_{index:04d}": _part(whole, part.shape)
        for index, (whole, part) in enumerate(zip(cache.layers, used.layers, strict=True))
    }
    arrays[_COUNTS] = np.stack(cache.counts())
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "library": identity,
        "checksums": json.dumps({name: _checksum(array) for name, array in arrays.items()}),
    }
    final = Path(path).resolve()
    try:
        if not final.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "its folder does not exist")
        with staging_folder(final) as folder:
            safetensors.numpy.save_file(arrays, folder / final.name, metadata)
            replace_file(folder / final.name, final)
    except (OSError, SafetensorError) as error:
        raise write_error(final, error, sum(array.nbytes for array in arrays.values())) from error


def _part(whole: Tensor, shape: Sequence[int]) -> np.ndarray:
    """All sequences' first entries along the other axes, as many as ``shape`` says; in place where that is possible."""
    array = np.from_dlpack(whole) if whole.device.type == "cpu" else whole.numpy()
    return np.ascontiguousarray(array[:, *(slice(int(n)) for n in shape[1:])])


@dataclass(frozen=True)
class CacheFile:
    """A saved cache that has been checked: ``counts`` int32 [counts, batch] (``CacheArrays.counts``)."""

    path: Path
    counts: np.ndarray
    checksums: Mapping[str, str]

    @property
    def batch(self) -> int:
        """Number of sequences."""
        batch: int = self.counts.shape[1]
        return batch

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.counts[-1].max())

    def least_capacity(self, policy: CachePolicy) -> int:
        """The capacity, in tokens per sequence, that a cache with this policy needs to take everything."""
        return capacity_for(policy, self.counts[-1], self.counts[0])

    def layers(self) -> Iterator[np.ndarray]:
        """Yield the layers' arrays, one in memory at a time; raises ArtifactError for a damaged one."""
        with safe_open(self.path, framework="np") as stored:
            for name in sorted(set(self.checksums) - {_COUNTS}):
                yield _array(stored, name, self.checksums, self.path)

    def fill(self, cache: CacheArrays) -> None:
        """Put everything into an empty ``cache`` of the library, of this batch and at least ``least_capacity``.

        Raises ArtifactError if an array is damaged or does not fit.
        """
        if len(self.checksums) != len(cache.layers) + 1 or self.counts.shape[0] != len(cache.counts()):
            raise ArtifactError(f"{self.path}: its arrays are not those of this library's cache; save it again")
        self._check_counts(cache.policy)
        for target, part in zip(cache.layers, self.layers(), strict=True):
            shape = tuple(int(n) for n in target.shape)
            fits = part.ndim == len(shape) and all(n <= m for n, m in zip(part.shape, shape, strict=True))
            if not fits or part.dtype != np.dtype(str(target.dtype)):
                raise ArtifactError(f"{self.path}: an array of {part.dtype} {part.shape} does not fit {shape}")
            whole = np.zeros(shape, part.dtype)
            whole[tuple(slice(n) for n in part.shape)] = part
            target.copyfrom(whole)
        cache.set_counts(list(self.counts))

    def _check_counts(self, policy: CachePolicy) -> None:
        """What is neither in tiles nor a sink must fit the ring."""
        if policy.segmented:
            behind = np.maximum(self.counts[-1] - policy.sinks, 0)
            waiting = behind - self.counts[0]
            if (waiting < 0).any() or (waiting > policy.ring).any():
                raise ArtifactError(f"{self.path} is damaged: its counts contradict the cache policy; save it again")


def read_cache_file(path: str | os.PathLike[str], identity: str) -> CacheFile:
    """Open a saved cache; raises ArtifactError for a damaged or foreign file, or one of another library."""
    file = Path(path)
    try:
        with safe_open(file, framework="np") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ArtifactError(f"{file} is not a saved KV cache; Session.save writes one")
            if metadata.get("version") != str(VERSION):
                found = metadata.get("version")
                raise ArtifactError(f"{file}: version is {found!r} and this release reads {VERSION}; save it again")
            if metadata.get("library") != identity:
                raise ArtifactError(
                    f"{file} was saved by a library with other weights, formats or cache policy than this one; "
                    "compute the prefix again"
                )
            checksums = _checksums(metadata.get("checksums", ""), stored.keys(), file)
            return CacheFile(file, _counts(_array(stored, _COUNTS, checksums, file), file), checksums)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read as a saved KV cache ({error})") from error


def _checksums(text: str, names: Sequence[str], file: Path) -> dict[str, str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or set(found) != set(names) or _COUNTS not in found:
        raise ArtifactError(f"{file} is damaged: its list of checksums does not match its arrays; save it again")
    return found


def _counts(counts: np.ndarray, file: Path) -> np.ndarray:
    if counts.ndim != 2 or counts.dtype != np.int32 or not counts.size or (counts < 0).any():
        raise ArtifactError(f"{file} is damaged: its counts are {counts.dtype} {counts.shape}; save it again")
    return counts


def _array(stored: Any, name: str, checksums: Mapping[str, str], file: Path) -> np.ndarray:
    array: np.ndarray = stored.get_tensor(name)
    if _checksum(array) != checksums[name]:
        raise ArtifactError(f"{file} is damaged: the SHA-256 of {name} does not match; compute the prefix again")
    return array


def _checksum(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    digest.update(_bytes(array))
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    # A view as bytes: NumPy gives no buffer of bfloat16.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
