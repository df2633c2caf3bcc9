"""A whole evaluation: settings in, one document of plain data out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rotquant_tvm.compile_cache import KEEP, cache_folder, environment_digest, model_digest
from rotquant_tvm.errors import UsageError
from rotquant_tvm.evaluation.layer_errors import layer_errors
from rotquant_tvm.evaluation.libraries import BASELINE, Candidate, Libraries, bits_by_length
from rotquant_tvm.evaluation.needle_scores import NeedleTest
from rotquant_tvm.evaluation.protocols import EveryToken, Generation, TextProtocol
from rotquant_tvm.evaluation.result_store import ResultStore
from rotquant_tvm.evaluation.scores import Score
from rotquant_tvm.evaluation.text_scores import TextEvaluation
from rotquant_tvm.evaluation.windows import Windows, read_text, text_windows
from rotquant_tvm.runtime import CompiledLibrary
from rotquant_tvm.target import resolve_target

VERSION = 1
"""Of the meaning of stored results; a change makes the stored ones unused."""


@dataclass(frozen=True)
class Settings:
    """What to evaluate: ``candidates``, beside the 16-bit cache, on ``text``, as ``tvmc eval`` documents its options.

    ``needle``: lengths of the texts that hide a needle; ``layers``: whether to measure every layer's attention error;
    ``results``: the folder that keeps results, None for the user's cache folder.
    """

    model: Path
    text: Path
    candidates: tuple[Candidate, ...]
    tokens: int = 16384
    context: int = 1024
    prefill: int = 512
    batch: int = 8
    protocols: tuple[str, ...] = ("every-token", "generation")
    needle: tuple[int, ...] = ()
    needle_trials: int = 4
    layers: bool = False
    target: str = "llvm"
    dtype: str = "float32"
    results: Path | None = None


class Evaluation:
    """Runs ``settings``; ``progress`` is called with the name of each step.

    Raises what reading the text, compiling and running raise, and UsageError for windows beyond the model's positions.
    """

    def __init__(self, settings: Settings, progress: Callable[[str], None] = lambda _step: None) -> None:
        self.settings, self.progress = settings, progress
        self.candidates = _distinct([BASELINE, *settings.candidates])
        self.text = read_text(settings.text)
        self.store = ResultStore(settings.results or cache_folder() / "evaluation")
        self.identity = {
            "version": VERSION,
            "model": model_digest(settings.model),
            "environment": environment_digest(),
            "target": str(resolve_target(settings.target)),
            "dtype": settings.dtype,
        }
        kept = 2 * len(self.candidates)
        self.libraries = Libraries(settings.model, settings.target, settings.dtype, progress, max(KEEP, kept))

    def document(self) -> dict[str, Any]:
        """Evaluate all that is asked for and return the results as plain data."""
        settings = self.settings
        needle = NeedleTest(settings.needle, settings.needle_trials, settings.batch)
        needle.check(self.baseline)
        protocols = {name: self._protocol_document(_protocol(name, settings)) for name in settings.protocols}
        document = {
            "model": str(settings.model),
            "model_digest": self.identity["model"],
            "text": str(settings.text),
            "text_digest": hashlib.sha256(self.text.encode()).hexdigest(),
            "target": self.identity["target"],
            "dtype": settings.dtype,
            "context": settings.context,
            "windows": len(self.windows),
            "bos": self.windows.bos,
            "configurations": [self._configuration(candidate) for candidate in self.candidates],
            "protocols": protocols,
            "results": str(self.store.path),
        }
        if settings.needle:
            document["needle"] = needle.document(
                self.libraries, self.candidates, self.text, self.store, self.identity, self.baseline, self.progress
            )
        if settings.layers:
            document["layers"] = self._layers_document()
        return document

    @cached_property
    def baseline(self) -> CompiledLibrary:
        """The 16-bit cache's library, in the form that the first protocol takes."""
        return self._library(BASELINE)

    @cached_property
    def windows(self) -> Windows:
        """The text's windows."""
        settings, library = self.settings, self.baseline
        if settings.context > library.info.max_position:
            raise UsageError(
                f"a window of {settings.context} tokens: the model's positions end at {library.info.max_position}"
            )
        if library.tokenizer is None:
            raise UsageError(f"{settings.model} has no tokenizer, so no text can be read with it")
        return text_windows(self.text, library.tokenizer, settings.tokens, settings.context)

    def _library(self, candidate: Candidate) -> CompiledLibrary:
        protocol = _protocol(self.settings.protocols[0], self.settings)
        return self.libraries.load(candidate, every_logit=protocol.every_logit, quantize_chunk=protocol.quantize_chunk)

    def _protocol_document(self, protocol: TextProtocol) -> dict[str, Any]:
        runner = TextEvaluation(self.libraries, self.windows, self.store, self.identity, self.progress)
        scores = runner.scores(protocol, self.candidates, self.settings.batch)
        rows = [_row(candidate, score, scores[0]) for candidate, score in zip(self.candidates, scores, strict=True)]
        return {"definition": protocol.definition, **protocol.parameters(), "rows": rows}

    def _layers_document(self) -> dict[str, Any]:
        ids, digest = self.windows.ids[0], self.windows.digest(0)
        return layer_errors(self.settings.model, ids, digest, self.candidates, self.store, self.identity, self.progress)

    def _configuration(self, candidate: Candidate) -> dict[str, Any]:
        """Describe a configuration and its true bits, which are stored: a library must be there to count them."""
        key = self.identity | candidate.key() | {"quantity": "bits"}
        bits = self.store.get(key)
        if bits is None:
            bits = bits_by_length(self._library(candidate))
            self.store.put(key, bits)
        return {"label": candidate.label, **candidate.key(), "bits_per_element": bits}


def _protocol(name: str, settings: Settings) -> TextProtocol:
    return EveryToken() if name == "every-token" else Generation(settings.prefill)


def _distinct(candidates: list[Candidate]) -> list[Candidate]:
    """Drop configurations that are spelled twice, the first spelling staying."""
    first: dict[str, Candidate] = {}
    for candidate in candidates:
        first.setdefault(str(candidate.key()), candidate)
    return list(first.values())


def _row(candidate: Candidate, score: Score, baseline: Score) -> dict[str, Any]:
    return {
        "label": candidate.label,
        "perplexity": score.perplexity,
        "perplexity_change": score.perplexity / baseline.perplexity - 1,
        "kl": score.mean_kl,
        "kl_standard_error": score.kl_standard_error,
        "top1_agreement": score.agreements / score.tokens,
        "tokens": score.tokens,
        "seconds": score.seconds,
    }
