"""Which columns of a padded batch hold real tokens: a packed cache stores these alone, row by row without gaps.

transformers counts columns: every row of a batch has as many, and a mask [batch, columns] says which are padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from ..errors import UsageError


@dataclass(frozen=True, eq=False)
class NewTokens:
    """The real tokens among a call's columns: ``lengths`` int32 [batch], how many per row.

    ``order``: int64 [batch, columns], a permutation of each row's columns that puts the real ones first, in order; None
    if they are first already. ``whole``: all columns are real.
    """

    lengths: np.ndarray
    order: np.ndarray | None
    whole: bool
    _placed: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict, repr=False)

    def device_lengths(self, device: torch.device) -> torch.Tensor:
        """``lengths`` on a device."""
        return self._on("lengths", device)

    def packed(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Put the columns of ``x`` [batch, …], along ``axis``, in ``order``."""
        return x if self.order is None else torch.take_along_dim(x, self._index(x, axis), axis)

    def unpacked(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Undo ``packed``."""
        if self.order is None:
            return x
        return torch.empty_like(x).scatter_(axis, self._index(x, axis).expand_as(x), x)

    def _index(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        order = self._on("order", x.device)
        shape = [1] * x.ndim
        shape[0], shape[axis] = order.shape
        return order.reshape(shape)

    def _on(self, name: str, device: torch.device) -> torch.Tensor:
        key = (name, str(device))
        if key not in self._placed:
            self._placed[key] = torch.as_tensor(getattr(self, name)).to(device)
        return self._placed[key]


@dataclass(frozen=True, eq=False)
class TokenColumns:
    """The columns seen so far: ``count`` of them, ``real`` bool [batch, count] or None if all are real."""

    batch: int
    count: int = 0
    real: np.ndarray | None = None

    def extended(self, new: int, mask: torch.Tensor | None) -> tuple[TokenColumns, NewTokens]:
        """Return the columns after ``new`` more, and which of these are real.

        ``mask``: bool [batch, count + new or more], None if nothing is padding. Raises ``UsageError`` for a mask of
        another shape, and for one that says of earlier columns what it did not say when they came.
        """
        total = self.count + new
        if mask is None and self.real is None:
            return self.extended_whole(new)
        if mask is None:
            raise UsageError("earlier calls had padding; give an attention_mask for all tokens, the past's included")
        if mask.ndim != 2 or mask.shape[0] != self.batch or mask.shape[1] < total:
            raise UsageError(
                f"the attention mask is {list(mask.shape)}; {self.batch} rows of {total} tokens need "
                f"[{self.batch}, {total}], the past's columns included"
            )
        columns = mask[:, :total].to("cpu", torch.bool).numpy()
        if self.real is None and columns.all():
            return self.extended_whole(new)
        if not np.array_equal(columns[:, : self.count], self._real()):
            raise UsageError(
                "the attention mask changed for tokens that are in the cache: it keeps those that were not masked when "
                "they came; reset() the cache, or give it the mask that it was filled with"
            )
        fresh = columns[:, self.count :]
        lengths = fresh.sum(axis=1).astype(np.int32)
        leading = np.arange(new) < lengths[:, None]
        order = None if np.array_equal(fresh, leading) else np.argsort(~fresh, axis=1, kind="stable")
        return TokenColumns(self.batch, total, columns), NewTokens(lengths, order, bool(fresh.all()))

    def extended_whole(self, new: int) -> tuple[TokenColumns, NewTokens]:
        """``extended`` where no column is padding, or it is stored like any token."""
        return TokenColumns(self.batch, self.count + new), NewTokens(np.full(self.batch, new, np.int32), None, True)

    def _real(self) -> np.ndarray:
        return np.ones((self.batch, self.count), bool) if self.real is None else self.real

    def same(self, other: TokenColumns) -> bool:
        """Whether two records say the same."""
        if (self.batch, self.count) != (other.batch, other.count):
            return False
        return self.real is other.real or np.array_equal(self._real(), other._real())

    @property
    def lengths(self) -> np.ndarray:
        """Real tokens per row, int32 [batch]."""
        counts: np.ndarray = self._real().sum(axis=1).astype(np.int32)
        return counts

    @cached_property
    def gaps(self) -> bool:
        """Whether a row has padding between two real tokens."""
        if self.real is None:
            return False
        steps = np.diff(self.real.astype(np.int8), axis=1, prepend=0)
        return bool(((steps == 1).sum(axis=1) > 1).any())

    def cropped(self, count: int) -> TokenColumns:
        """The first ``count`` columns."""
        return TokenColumns(self.batch, count, None if self.real is None else self.real[:, :count])

    def select(self, rows: Sequence[int]) -> TokenColumns:
        """The columns of rows ``rows[i]``."""
        return TokenColumns(len(rows), self.count, None if self.real is None else self.real[list(rows)])
