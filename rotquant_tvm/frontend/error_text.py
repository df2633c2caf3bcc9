"""Other packages' errors as one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
