"""The share of needles that every cache configuration retrieves, by length of the text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rotquant_tvm.errors import UsageError
from rotquant_tvm.evaluation.libraries import Candidate, Libraries
from rotquant_tvm.evaluation.needle import (
    ANSWER_TOKENS,
    DEPTHS,
    NeedlePrompt,
    answers,
    definition,
    needle_prompts,
    retrieved,
)
from rotquant_tvm.evaluation.result_store import ResultStore
from rotquant_tvm.runtime import CompiledLibrary


@dataclass(frozen=True)
class NeedleTest:
    """Asks ``trials`` needles per depth at each of ``lengths`` tokens, at most ``batch`` at a time."""

    lengths: tuple[int, ...]
    trials: int
    batch: int

    def check(self, library: CompiledLibrary) -> None:
        """Raise UsageError for a length beyond the model's positions."""
        limit = library.info.max_position - ANSWER_TOKENS
        for length in self.lengths:
            if length > limit:
                raise UsageError(f"a needle in {length} tokens: this model takes at most {limit} beside the answer")

    def document(
        self,
        libraries: Libraries,
        candidates: Sequence[Candidate],
        text: str,
        store: ResultStore,
        identity: dict[str, Any],
        baseline: CompiledLibrary,
        progress: Callable[[str], None],
    ) -> dict[str, Any]:
        """Return the shares retrieved, and for every candidate and length those by depth, as plain data."""
        tokenizer = baseline.tokenizer
        assert tokenizer is not None
        prompts = {length: needle_prompts(text, tokenizer, length, self.trials) for length in self.lengths}
        rows = []
        for candidate in candidates:
            key = identity | candidate.key() | {"quantity": "needle"}
            found: dict[str, Any] = {}
            by_depth: dict[str, Any] = {}
            for length, asked in prompts.items():
                hits = self._hits(libraries, candidate, asked, store, key, progress, length)
                found[str(length)] = sum(hits) / len(hits)
                by_depth[str(length)] = [
                    sum(h for h, p in zip(hits, asked, strict=True) if p.depth == depth) / self.trials
                    for depth in DEPTHS
                ]
            rows.append({"label": candidate.label, "retrieved": found, "by_depth": by_depth})
        return {
            "definition": definition(),
            "lengths": list(self.lengths),
            "depths": list(DEPTHS),
            "prompts_per_length": self.trials * len(DEPTHS),
            "rows": rows,
        }

    def _hits(
        self,
        libraries: Libraries,
        candidate: Candidate,
        prompts: Sequence[NeedlePrompt],
        store: ResultStore,
        key: dict[str, Any],
        progress: Callable[[str], None],
        length: int,
    ) -> list[bool]:
        """Answer what is not in the store, and say which needles were retrieved."""
        keys = [key | {"prompt": _digest(prompt)} for prompt in prompts]
        pending = [index for index, each in enumerate(keys) if store.get(each) is None]
        for start in range(0, len(pending), self.batch):
            group = pending[start : start + self.batch]
            library = libraries.load(candidate)
            progress(f"{candidate.label}: needles {group[0] + 1}–{group[-1] + 1} of {len(prompts)} in {length} tokens")
            for index, answer in zip(group, answers(library, [prompts[i] for i in group]), strict=True):
                store.put(keys[index], answer)
        return [retrieved(store.get(each), prompt.key) for each, prompt in zip(keys, prompts, strict=True)]


def _digest(prompt: NeedlePrompt) -> str:
    return hashlib.sha256(repr((prompt.ids, prompt.question_tokens)).encode()).hexdigest()
