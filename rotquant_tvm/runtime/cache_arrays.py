"""The arrays of one KV cache: the layers', the counts per sequence, and the host's mirror of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import tvm
from tvm.runtime import Device, Tensor

from rotquant_tvm.cache_policy import NO_POLICY, CachePolicy
from rotquant_tvm.errors import UsageError
from rotquant_tvm.runtime.cache_allocation import allocated_copy
from rotquant_tvm.runtime.device import device_errors
from rotquant_tvm.runtime.written_tokens import WrittenTokens
from rotquant_tvm.window_ring import WindowRing


class CacheArrays:
    """The tensors that ``create_kv_cache`` made, which prefill and decode update in place.

    ``layers``: the layers' arrays, on ``device``: tiles uint32 [batch, kv_heads, tiles, tile_bytes / 4] each and,
    with a ``policy``, centres and 16-bit rows. The counts live twice: lengths and, with a policy, how many tokens are
    in tiles, int32 [batch] each, on the device, where the library reads and advances them, and here on the host,
    where capacity is checked. Every method leaves the two equal. ``rings``: those of layers that keep only a window.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        device: Device,
        policy: CachePolicy = NO_POLICY,
        rings: Sequence[WindowRing] = (),
    ) -> None:
        counts = 2 if policy.segmented else 1
        self.layers, self._counts = tuple(tensors[:-counts]), tuple(tensors[-counts:])
        self.device, self.policy = device, policy
        self._lengths: np.ndarray = self._counts[-1].numpy()
        self._packed: np.ndarray = self._counts[0].numpy() if policy.segmented else self._lengths
        self._written = WrittenTokens(rings, self.batch)
        self._written.note(self._lengths, self._packed)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All arrays in the order in which the library takes them, the lengths last."""
        return (*self.layers, *self._counts)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self._lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens stored per sequence, int32 [batch]; a copy of the host's mirror."""
        return self._lengths.copy()

    def device_lengths(self) -> np.ndarray:
        """Read the lengths from the device, int32 [batch]."""
        values: np.ndarray = self._counts[-1].numpy()
        return values

    def counts(self) -> list[np.ndarray]:
        """Copies of the host's counts, int32 [batch] each.

        They are, with a policy, the packed tokens; with rings, those of ``WrittenTokens``; then the lengths.
        """
        packed = [self._packed.copy()] if self.policy.segmented else []
        return [*packed, *self._written.counts(), self._lengths.copy()]

    def set_counts(self, counts: Sequence[np.ndarray]) -> None:
        """Take over what ``counts`` of a cache with the same tokens gave, on the host and on the device."""
        values = [np.ascontiguousarray(count, dtype=np.int32) for count in counts]
        self._lengths = values[-1]
        self._packed = values[0] if self.policy.segmented else values[-1]
        self._written = WrittenTokens(self._written.rings, self.batch)
        self._written.note(self._lengths, self._packed)
        if self._written.rings:
            self._written.note(*values[-3:-1])
        self._counts[-1].copyfrom(self._lengths)
        if self.policy.segmented:
            self._counts[0].copyfrom(self._packed)

    @property
    def tokens_in_use(self) -> int:
        """The capacity, at least 1, of a cache that what is held fits: a crop may have left more blocks begun."""
        return capacity_for(self.policy, self._lengths, self._packed)

    @property
    def nbytes(self) -> int:
        """Bytes of the layers' arrays as they are allocated now (the lengths not counted)."""
        return sum(_nbytes(layer) for layer in self.layers)

    def advance(self, new_lengths: np.ndarray, chunk: bool = True) -> None:
        """Note on the host that prefill (``chunk``) or decode has appended ``new_lengths`` [batch] tokens."""
        self._lengths = self._lengths + new_lengths.astype(np.int32)
        self._packed = self.policy.packed_after(self._packed, self._lengths, chunk)
        self._written.note(self._lengths, self._packed)

    def set_lengths(self, lengths: np.ndarray) -> None:
        """Set the lengths, int [batch], on the host and on the device; tokens in tiles stay there."""
        values = np.ascontiguousarray(lengths, dtype=np.int32)
        self._lengths = values.copy()
        self._counts[-1].copyfrom(values)
        if self.policy.segmented:
            behind = np.maximum(self._lengths - self.policy.sinks, 0)
            self._packed = np.ascontiguousarray(np.minimum(self._packed, behind), dtype=np.int32)
            self._counts[0].copyfrom(self._packed)
        self._written.restart(self._lengths, self._packed)

    def assume(self, lengths: np.ndarray) -> None:
        """Take the arrays for those of sequences of ``lengths``, int [batch], which someone else has written.

        With a policy as many tokens count as packed as if they had come one by one.
        """
        self._packed = self.policy.packed_after(np.zeros(self.batch, np.int32), lengths.astype(np.int32), False)
        self._written = WrittenTokens(self._written.rings, self.batch)
        self.set_lengths(lengths)
        self._written.note(self._lengths, self._packed)

    def restore(self, lengths: np.ndarray) -> None:
        """Go back to ``lengths`` [batch] after a call that failed midway.

        Sequences of which it had begun to flush tokens into tiles keep only those that are safe: the ring's slots may
        be overwritten. One whose window it may have overwritten in a ring of tiles is emptied.
        """
        self._written.note(self.device_lengths(), self._counts[0].numpy())
        if self.policy.segmented:
            moved = self._counts[0].numpy() != self._packed
            safe = np.minimum(lengths, self.policy.sinks + self._packed)
            lengths = np.where(moved, safe, lengths)
        self.set_lengths(np.where(self._written.possible(lengths), lengths, 0))

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Go back to the sequences before, as far as they are whole, if the library fails or is interrupted."""
        before = self.lengths
        try:
            yield
        except BaseException:
            with suppress(Exception):  # a device that is gone refuses; the first error is the one to see
                self.restore(before)
            raise

    def shortest_crop(self) -> np.ndarray:
        """Return the least numbers of tokens, int [batch], that ``crop`` can keep, none aside.

        0 where every number is possible: in a cache without a window, and as long as no ring has given up a tile.
        """
        return self._written.shortest()

    def crop(self, keep: int | Sequence[int] | np.ndarray) -> None:
        """Keep the first ``keep`` tokens of every sequence, or ``keep[i]`` of sequence i.

        One number leaves shorter sequences as they are. Raises UsageError for a negative number, for more
        tokens than the longest sequence has, for more than its own sequence has if ``keep`` is per
        sequence, for a wrong number of entries, and where a layer with a window has given up tokens that the next ones
        would see (``shortest_crop``).
        """
        wanted = np.asarray(keep)
        if wanted.dtype.kind not in "iu" or wanted.shape not in ((), (self.batch,)):
            raise UsageError(f"crop({keep!r}): expected one integer or {self.batch}, one per sequence")
        limit = self._lengths.max() if wanted.ndim == 0 else self._lengths
        if (wanted < 0).any() or (wanted > limit).any():
            raise UsageError(f"crop({keep!r}): the sequences hold {self._lengths.tolist()} tokens")
        kept = np.minimum(wanted, self._lengths)
        if not (possible := self._written.possible(kept)).all():
            raise UsageError(self._refusal(f"crop({keep!r})", int(np.argmin(possible))))
        self.set_lengths(kept)

    def _refusal(self, call: str, sequence: int) -> str:
        """Why a sequence cannot be cropped."""
        windows = " and ".join(str(ring.window) for ring in self._written.rings)
        shortest, always = self.shortest_crop()[sequence], self._written.always
        few = f"at most {always}" if always else "0"
        return (
            f"{call}: layers with a window of {windows} tokens keep only the last ones of sequence {sequence}, which "
            f"holds {self._lengths[sequence]}; crop to {shortest} or more, or to {few} and prefill again"
        )

    def copy(self) -> CacheArrays:
        """Return an independent copy on the same device; raises DeviceError if it does not fit."""
        what, remedy = "cannot copy the KV cache", "free memory on the device or use a smaller capacity"
        copies = allocated_copy(
            self.device, self.nbytes, what, remedy, lambda: [tensor.copyto(self.device) for tensor in self.tensors]
        )
        with device_errors(what, remedy):
            return self._like(copies, range(self.batch))

    def gather(self, indices: Sequence[int] | np.ndarray) -> CacheArrays:
        """Return a cache whose sequence i is a copy of sequence ``indices[i]``; any number of them.

        Raises UsageError if an index is no sequence of this cache, DeviceError if the copy does not fit.
        """
        order = np.asarray(indices)
        if order.ndim != 1 or not len(order) or order.dtype.kind not in "iu":
            raise UsageError(f"reorder({indices!r}): expected a list of sequence indices")
        if order.min() < 0 or order.max() >= self.batch:
            raise UsageError(f"reorder({indices!r}): the sequences are numbered 0 to {self.batch - 1}")
        rows = [int(index) for index in order]
        what, remedy = "cannot reorder the KV cache", "free memory on the device or use fewer sequences"
        needed = self.nbytes // self.batch * len(rows)
        copies = allocated_copy(
            self.device, needed, what, remedy, lambda: [_gather(tensor, rows, self.device) for tensor in self.tensors]
        )
        with device_errors(what, remedy):
            return self._like(copies, rows)

    def _like(self, tensors: Sequence[Tensor], order: Sequence[int]) -> CacheArrays:
        """The cache of copies of this one's sequences ``order``."""
        cache = CacheArrays(tensors, self.device, self.policy, self._written.rings)
        cache._written = self._written.select(order)
        return cache


def capacity_for(policy: CachePolicy, lengths: np.ndarray, packed: np.ndarray) -> int:
    """The least capacity of a cache whose sequences have ``lengths`` and so many ``packed`` tokens, int [batch] each.

    It may be more than the longest sequence: tokens that were packed stay in their tiles when others are cropped.
    """
    blocks: list[int] = []
    if policy.segmented:
        begun = -(-packed // policy.block) * policy.block + (policy.sinks + policy.recent)
        blocks = begun[packed > 0].tolist()
    held: list[int] = lengths.tolist()
    return max(1, *held, *blocks)


def _nbytes(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * int(tensor.dtype.itemsize)


def _gather(tensor: Tensor, rows: Sequence[int], device: Device) -> Tensor:
    """Copy the given entries of axis 0 without leaving the device."""
    gathered = tvm.runtime.empty((len(rows), *tensor.shape[1:]), tensor.dtype, device)
    row_bytes = _nbytes(tensor) // tensor.shape[0]
    for target, source in enumerate(rows):
        row = tensor._create_view(tensor.shape[1:], relative_byte_offset=source * row_bytes)
        row.copyto(gathered._create_view(tensor.shape[1:], relative_byte_offset=target * row_bytes))
    return gathered
