"""Other packages' errors as one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of a package written in Rust, which is no ``Exception`` of Python's."""
    return type(error).__name__ == "PanicException"
