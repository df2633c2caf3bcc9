"""The project's exceptions; each carries the exit status that ``tvmc`` ends with."""

from __future__ import annotations


class RotQuantError(Exception):
    """Base of every error that this project raises on purpose."""

    exit_status = 1


class UsageError(RotQuantError, ValueError):
    """A bad argument: an unknown option value, a capacity of 0, an unwritable output."""

    exit_status = 2


class FormatError(UsageError):
    """An unknown KV format, or one that cannot take a head dimension; the message says what to use instead."""


class ModelError(RotQuantError):
    """A model or input file that is refused: unreadable, no decoder, or with an attention that cannot be rewritten."""

    exit_status = 4


class ArtifactError(ModelError):
    """A compiled artifact that is damaged, incomplete or of another version."""


class DeviceError(RotQuantError):
    """A device or its toolchain failed or is absent."""

    exit_status = 3


class KVCacheFull(RotQuantError):
    """An append would exceed the cache's capacity; the cache is unchanged and still usable.

    Attributes: ``capacity`` (tokens per sequence allocated) and ``needed`` (tokens the call would have needed).
    """

    def __init__(self, capacity: int, needed: int) -> None:
        self.capacity = capacity
        self.needed = needed
        super().__init__(
            f"the KV cache holds {capacity} tokens per sequence and this call needs {needed}; "
            f"create the session with capacity={needed} or more, or crop() first"
        )
