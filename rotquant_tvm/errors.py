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


class LogError(ModelError):
    """A tuning log that is not there, damaged, of another version, or at odds with itself."""


class DeviceError(RotQuantError):
    """A device or its toolchain failed or is absent."""

    exit_status = 3


class KVCacheFull(RotQuantError):
    """An append would exceed the cache's capacity; the cache is unchanged and still usable.

    Attributes: ``capacity`` (tokens per sequence allocated), ``needed`` (tokens the call would have needed),
    ``max_position`` (where the model's positions end, if a larger cache would therefore not help, else None) and
    ``sequence`` (the number of the one that would be longest, None where there is only one).
    """

    exit_status = 2

    def __init__(
        self, capacity: int, needed: int, max_position: int | None = None, sequence: int | None = None
    ) -> None:
        self.capacity = capacity
        self.needed = needed
        self.sequence = sequence
        self.max_position = None if max_position is None or needed <= max_position else max_position
        if self.max_position is None:
            remedy = f"create the session with capacity={needed} or more, or crop() first"
        else:
            remedy = f"the model's positions end at {max_position}: shorten the input, lower max_tokens or crop() first"
        who = "" if sequence is None else f" for sequence {sequence}"
        super().__init__(
            f"the KV cache holds {capacity} tokens per sequence and this call needs {needed}{who}; {remedy}"
        )
