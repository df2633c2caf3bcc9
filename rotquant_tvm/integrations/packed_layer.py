"""The packed keys and values of one layer, as torch tensors see them: attended to, read, grown and reordered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import tvm
import tvm_ffi
from torch.utils.dlpack import from_dlpack

from ..errors import KVCacheFull, UsageError
from ..formats import Rotation
from ..runtime.cache_info import LayerInfo
from .attention_geometry import AttentionGeometry
from .attention_library import READ, AttentionLibrary, attention_library
from .token_columns import NewTokens

FIRST_CAPACITY = 256
_ALIGNMENT = 64
"""Bytes; vector kernels take arrays that begin at a multiple of them."""


def device_name(device: torch.device) -> str:
    """TVM's name of a torch device; raises ``UsageError`` for other devices than CPUs and CUDA GPUs."""
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda" and torch.version.hip is None:
        return f"cuda:{device.index or 0}"
    raise UsageError(f"the model is on {device}; packed caches are for cpu and cuda")


def kernel_dtype(tensor: torch.Tensor) -> str:
    """The dtype in which kernels take a tensor: float32 on CPUs, and on GPUs float16 for models of 16 bits."""
    wide = tensor.device.type == "cpu" or tensor.dtype == torch.float32
    return "float32" if wide else "float16"


class PackedLayer:
    """Keys and values of ``batch`` sequences; ``limit``: the most tokens that one may have, None for no limit.

    Raises ``FormatError``, ``ModelError`` or ``DeviceError`` as ``attention_library`` does.
    """

    def __init__(
        self,
        geometry: AttentionGeometry,
        rotations: Mapping[str, Rotation],
        device: torch.device,
        batch: int,
        limit: int | None,
    ) -> None:
        self.geometry, self.device, self.limit = geometry, device, limit
        name = device_name(device)
        self.capacity = limit or FIRST_CAPACITY
        with self._stream():  # copies to the device too: a kernel on another stream would not wait for them
            self._library: AttentionLibrary = attention_library(geometry, name)
            data = (np.asarray(rotation.data, np.float32) for rotation in rotations.values())
            self._rotations = tuple(tvm.runtime.tensor(array, tvm.runtime.device(name)) for array in data)
            self._arrays = self._library.create(batch, self.capacity)

    @property
    def info(self) -> LayerInfo:
        """Formats, policy and bytes of the layer."""
        return self._library.library.info.layers[0]

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self._arrays.batch

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per sequence, int32 [batch]."""
        return self._arrays.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays as they are allocated now."""
        return self._arrays.nbytes

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, new: NewTokens) -> torch.Tensor:
        """Append the new tokens and attend to everything.

        query [batch, heads, columns, head_dim], key and value [batch, kv_heads, columns, head_dim]; returns
        [batch, columns, heads, head_dim] in the query's dtype, zero where a column is padding. Raises ``KVCacheFull``
        before anything changes.
        """
        if not new.lengths.any():
            return query.new_zeros(query.shape).transpose(1, 2)
        step = new.whole and query.shape[2] == 1
        with self._stream():
            self._make_room(new.lengths)
            operands = [self._operand(new.packed(query, 2).transpose(1, 2))]
            operands += [self._operand(new.packed(x, 2)) for x in (key, value)]
            if not step:
                operands.append(new.device_lengths(self.device))
            function = "decode" if step else "prefill"
            output = _torch(self._library.run(function, *operands, *self._arrays.tensors, *self._rotations))
            self._arrays.advance(new.lengths, chunk=not step)
            return new.unpacked(output, 1).to(query.dtype)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values as they are stored, float32 [batch, kv_heads, longest, head_dim], zero behind the last.

        For geometries that are ``readable``.
        """
        longest = int(self.lengths.max(initial=0))
        with self._stream():
            pair = self._library.run(READ, *self._arrays.tensors, *self._rotations)
            keys, values = (_torch(x)[:, :, :longest] for x in pair)
        return keys, values

    def reset(self) -> None:
        """Forget all tokens."""
        with self._stream():
            self._arrays.set_lengths(np.zeros(self.batch, np.int32))

    def check_crop(self, lengths: np.ndarray) -> None:
        """Raise ``UsageError`` if a layer with a window has given up what the next tokens would see."""
        shortest = self._arrays.shortest_crop()
        if ((lengths > 0) & (lengths < shortest)).any():
            raise UsageError(
                f"layers with a window of {self.geometry.window} tokens keep only the last ones: the sequences can be "
                f"cropped to {shortest.tolist()} tokens or more, or reset()"
            )

    def crop(self, lengths: np.ndarray) -> None:
        """Keep the first ``lengths[i]`` tokens of sequence i; raises as ``check_crop``."""
        self.check_crop(lengths)
        with self._stream():
            self._arrays.crop(lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Make sequence i a copy of sequence ``rows[i]``; there may be more or fewer than before."""
        with self._stream():
            self._library.library.check_batch(len(rows))
            self._arrays = self._arrays.gather(rows)

    def __deepcopy__(self, _memo: dict[int, Any]) -> PackedLayer:
        twin = object.__new__(PackedLayer)
        twin.__dict__.update(self.__dict__)
        with self._stream():
            twin._arrays = self._arrays.copy()
        return twin

    def _make_room(self, new: np.ndarray) -> None:
        lengths = self.lengths + new
        needed = int(lengths.max())
        if needed <= self.capacity:
            return
        if self.limit is not None:
            raise _full(self.limit, needed, int(lengths.argmax()))
        capacity = max(needed, self.capacity + max(FIRST_CAPACITY, self.capacity // 4))
        grown = self._library.create(self.batch, capacity)
        for old, larger in zip(self._arrays.layers, grown.layers, strict=True):
            source, target = _torch(old), _torch(larger)
            if source.shape == target.shape:  # 16-bit rows, and rings that are full
                target.copy_(source)
            else:  # tiles and centres, by their place
                target[:, :, : source.shape[2]].copy_(source)
        grown.set_counts(self._arrays.counts())
        self._arrays, self.capacity = grown, capacity

    def _operand(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().to(getattr(torch, self.geometry.dtype)).contiguous()
        return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()

    def _stream(self) -> AbstractContextManager[Any]:
        """TVM's copies and kernels go where torch's go."""
        if self.device.type == "cpu":
            return nullcontext()
        stream = torch.cuda.current_stream(self.device).cuda_stream
        return tvm_ffi.use_raw_stream(tvm.runtime.device(device_name(self.device)), stream)


def _full(limit: int, needed: int, sequence: int) -> KVCacheFull:
    error = KVCacheFull(limit, needed, sequence=sequence)
    error.args = (
        f"the cache's max_length is {limit} tokens per sequence and this call needs {needed} for sequence {sequence}; "
        "make it with a larger max_length, or with none, and it grows as it is filled",
    )
    return error


def _torch(tensor: Any) -> torch.Tensor:
    return tensor if isinstance(tensor, torch.Tensor) else from_dlpack(tensor)
