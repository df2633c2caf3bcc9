"""Compiled artifacts kept in the user's cache folder, so that the same compile is not done twice.

An entry's name is the SHA-256 over all that decides what a compile gives: the model's content, the KV
formats, the target, the batch if it is fixed, the capacity, the dtype, the versions of the packages involved, this
package's own sources and the tuning logs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from .artifact_folder import check_output
from .errors import ArtifactError, ModelError, UsageError
from .frontend import ImportedModel, import_model
from .frontend.source_files import source_files
from .input_shapes import fixed_batch
from .kv_cache_config import KVCacheConfig
from .linker import linker_command
from .process_locks import locked_file, remove_abandoned_file
from .shared_weights import share_weights
from .staging import ABANDONED_SECONDS, remove_abandoned
from .tuning.log_folders import user_log_files

KEEP = 8
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "transformers", "gguf", "onnx", "numpy")
_SOURCES = ("rotquant_tvm", "rotquant_tvm.passes", "rotquant_tvm.schedules", "rotquant_tvm.tuning_logs")
_WITHOUT_EFFECT = ("cli", "evaluation", "benchmark")  # subpackages that no compile runs
_ENTRY = re.compile(r"[0-9a-f]{64}")
_RETIRED = re.compile(r"\.[0-9a-f]{64}\.[a-z0-9_]{8}\.replaced")
_LOCK = re.compile(r"\.[0-9a-f]{64}\.lock")
Progress: TypeAlias = Callable[[str], None]


def cache_folder() -> Path:
    """Return where artifacts are kept: ``rotquant_tvm`` in $XDG_CACHE_HOME, or in ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG specification says to ignore those
        base = Path.home() / ".cache"
    return base / "rotquant_tvm"


def _silent(_stage: str) -> None:
    pass


@dataclass(frozen=True)
class CachedArtifact:
    """An artifact's folder, and whether it was ``found`` rather than compiled now."""

    path: Path
    found: bool


@dataclass
class CompileCache:
    """Compiles models, or finds what an earlier compile left.

    ``folder``: where entries lie (default: ``cache_folder()``). ``keep``: how many, the newest, stay. One
    import serves all compiles of a model.
    """

    folder: Path = field(default_factory=cache_folder)
    keep: int = KEEP
    _imported: dict[tuple[str, str, bool], ImportedModel] = field(default_factory=dict, repr=False)

    def artifact(
        self,
        model: str | os.PathLike[str],
        kv_cache: str | KVCacheConfig = "rq3",
        target: str = "llvm",
        *,
        kv_layers: str | None = None,
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        capacity: int = 4096,
        dtype: str = "float32",
        every_logit: bool = False,
        progress: Progress = _silent,
    ) -> CachedArtifact:
        """Return the artifact of a model, which is a directory or a file; arguments as of ``compile``.

        ``every_logit`` as of ``import_model``. An entry that is damaged is compiled again. ``progress`` is called
        with the name of each stage. Raises what ``compile`` raises, UsageError if the folder cannot be written, and
        DeviceError if there is no compiler to link the library with.
        """
        from .compiler import compile
        from .target import resolve_target

        config = KVCacheConfig.of(kv_cache, kv_layers)
        batch = fixed_batch(input_shapes)
        resolved = resolve_target(target)
        progress("look into the compile cache")

        def make() -> Callable[[Path], None]:
            imported = self._import(model, dtype, every_logit, progress)
            compiled = compile(
                imported, config, resolved, input_shapes=input_shapes, capacity=capacity, progress=progress
            )
            progress("write")

            def save(path: Path) -> None:
                compiled.save(path)
                share_weights(path, sorted(entry for entry in self.folder.iterdir() if _ENTRY.fullmatch(entry.name)))

            return save

        options = (batch, capacity, dtype, every_logit)
        return self.entry((model_digest(model), _config_text(config), str(resolved), *options), make, progress)

    def entry(
        self, key: Sequence[object], make: Callable[[], Callable[[Path], object]], progress: Progress = _silent
    ) -> CachedArtifact:
        """Return the artifact under ``key`` (plain data) and under the versions and sources of this environment.

        If it is not there, or damaged (there is a warning then), ``make`` compiles and returns what saves the artifact
        at a path. Of several processes that want one entry the first makes it, and the others wait. Raises what
        these raise, UsageError if the folder cannot be written, and DeviceError if there is no compiler to link with.
        """
        path = self.folder / hashlib.sha256(json.dumps((*key, _environment())).encode()).hexdigest()
        if self._is_whole(path):
            return CachedArtifact(path, found=True)
        self._check_writable(path)
        linker_command()
        with locked_file(path.with_name(f".{path.name}.lock"), lambda: progress("wait for another process's compile")):
            if self._is_whole(path, progress):  # made while this process waited
                return CachedArtifact(path, found=True)
            save = make()
            _remove(path)  # if damaged: what is left of it may no longer look like an artifact
            save(path)
            self._prune(path)
        return CachedArtifact(path, found=False)

    def _is_whole(self, path: Path, progress: Progress | None = None) -> bool:
        """Whether there is an undamaged entry, which now counts as used; with ``progress``, a damaged one is told."""
        from .runtime import read_artifact

        try:
            read_artifact(path)
            os.utime(path)
            return True
        except (ArtifactError, OSError) as error:  # not there, damaged, or just being removed
            if progress is not None and os.path.lexists(path):
                told = f"an entry of the compile cache is damaged and is made again: {str(error).split(';')[0]}"
                warnings.warn(told, stacklevel=4)
                progress(told)
            return False

    def _import(
        self, model: str | os.PathLike[str], dtype: str, every_logit: bool, progress: Progress
    ) -> ImportedModel:
        key = (str(Path(model).resolve()), dtype, every_logit)
        if key not in self._imported:
            progress("import")
            self._imported[key] = import_model(model, dtype=dtype, every_logit=every_logit)
        return self._imported[key]

    def _check_writable(self, path: Path) -> None:
        try:
            if not path.exists():
                check_output(path)
        except UsageError as error:
            raise UsageError(f"the compile cache {self.folder} cannot be written; set XDG_CACHE_HOME") from error

    def _prune(self, newest: Path) -> None:
        """Remove all but the newest entries, and what interrupted compiles left behind; nothing else."""
        changed: dict[Path, float] = {}
        for entry in self.folder.iterdir():
            with suppress(OSError):  # another process may be removing it
                changed[entry] = entry.stat().st_mtime
        remove_abandoned(self.folder, _ENTRY.pattern)
        for entry in changed:
            if _LOCK.fullmatch(entry.name):
                remove_abandoned_file(entry, ABANDONED_SECONDS)
        left = [entry for entry in changed if _RETIRED.fullmatch(entry.name)]
        whole = [entry for entry in changed if _ENTRY.fullmatch(entry.name) and entry != newest]
        whole.sort(key=changed.__getitem__, reverse=True)
        deadline = time.time() - ABANDONED_SECONDS
        for entry in [*whole[self.keep - 1 :], *(entry for entry in left if changed[entry] < deadline)]:
            _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def model_digest(model: str | os.PathLike[str]) -> str:
    """Return the SHA-256 (hex) of a model file, or of the names and contents of all the files that make a model.

    Raises ModelError if one cannot be read.
    """
    path = Path(model)
    try:
        files = source_files(path)
        if files == [path]:
            return _file_digest(path)
        return _digest([(file.name, _file_digest(file)) for file in files])
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _config_text(config: KVCacheConfig) -> str:
    overrides = {index: formats.name for index, formats in sorted(config.overrides.items())}
    return json.dumps([config.name, overrides, config.seed, config.quantize_chunk, config.on_unsupported])


def environment_digest() -> str:
    """Return the SHA-256 (hex) of what, beside its arguments, decides what a compile gives: versions and sources."""
    return _digest(_environment())


def _environment() -> list[object]:
    """Collect the versions of the packages that a compile depends on, and a digest of our sources and tuning logs."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    sources = []
    for name in _SOURCES:
        spec = importlib.util.find_spec(name)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            for file in sorted(Path(root).rglob("*")):
                parts = file.relative_to(root).parts
                if file.suffix in (".py", ".json") and parts[0] not in _WITHOUT_EFFECT:
                    sources.append([name, *parts, _file_digest(file)])
    logs = [[file.parent.name, file.name, _file_digest(file)] for file in user_log_files()]
    return [versions, _digest([sources, logs])]
