"""The libraries that an evaluation runs: compiled once, kept in the compile cache, with one copy of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotquant_tvm.compile_cache import KEEP, CompileCache
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.report import LENGTHS, true_bits
from rotquant_tvm.runtime import load_library, read_artifact

if TYPE_CHECKING:
    from rotquant_tvm.runtime import CompiledLibrary

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A cache configuration under evaluation; ``label`` is how the user spelled it."""

    label: str
    config: KVCacheConfig

    @classmethod
    def parse(cls, text: str, layers: str | None = None) -> Candidate:
        """Read the texts of --kv-cache and --kv-layers; raises as ``KVCacheConfig.parse``."""
        label = text.strip() if layers is None else f"{text.strip()} [{layers.strip()}]"
        return cls(label, KVCacheConfig.parse(text, layers))

    def key(self) -> dict[str, Any]:
        """Return what tells configurations apart, as plain data."""
        overrides = {str(index): formats.name for index, formats in sorted(self.config.overrides.items())}
        return {"kv_cache": self.config.name, "kv_layers": overrides, "seed": self.config.seed}


BASELINE = Candidate("f16", KVCacheConfig.parse("f16"))


@dataclass
class Libraries:
    """Compiles and loads the configurations of one model.

    Attributes: ``model`` (path), ``target``, ``dtype``, ``progress`` (called with the name of each stage), ``keep``
    (entries that the compile cache may hold). Loaded libraries share their weights where these are the same.
    """

    model: Path
    target: str = "llvm"
    dtype: str = "float32"
    progress: Progress = lambda _stage: None
    keep: int = KEEP
    _cache: CompileCache | None = field(default=None, repr=False)
    _loaded: dict[tuple[str, bool, bool], CompiledLibrary] = field(default_factory=dict, repr=False)
    _weights: dict[str, Any] = field(default_factory=dict, repr=False)

    def load(self, candidate: Candidate, *, every_logit: bool = False, quantize_chunk: bool = False) -> CompiledLibrary:
        """Return a configuration's library; raises what compiling and loading raise."""
        key = (str(candidate.key()), every_logit, quantize_chunk)
        if key not in self._loaded:
            self._loaded[key] = self._load(candidate, every_logit, quantize_chunk)
        return self._loaded[key]

    def _load(self, candidate: Candidate, every_logit: bool, quantize_chunk: bool) -> CompiledLibrary:
        def progress(stage: str) -> None:
            self.progress(f"{candidate.label}: {stage}")

        if self._cache is None:
            self._cache = CompileCache(keep=self.keep)
        config = replace(candidate.config, quantize_chunk=quantize_chunk)
        found = self._cache.artifact(
            self.model, config, self.target, dtype=self.dtype, every_logit=every_logit, progress=progress
        )
        progress("load")
        artifact = read_artifact(found.path, verify=False)  # the cache has just verified it
        library = load_library(found.path, verify=False)
        weights = artifact.manifest.files["weights.safetensors"].sha256
        library.weights = self._weights.setdefault(weights, library.weights)
        return library


def bits_by_length(library: CompiledLibrary) -> dict[str, float]:
    """Return the true bits per element at each of ``LENGTHS`` tokens, by length as text."""
    return {str(length): true_bits(dict(library.info.document), length) for length in LENGTHS}
