"""Running torch and transformers without their logs and progress bars; their errors as one line."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import transformers

from rotquant_tvm.frontend.error_text import first_line

__all__ = ["first_line", "quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence logging, warnings, prints and progress bars for a while; errors still rise.

    torch prints the graph of a failed export to standard output, which belongs to the command line's JSON.
    """
    disabled = logging.root.manager.disable
    bars = transformers.utils.logging.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
