"""The directory that a compile leaves behind: written atomically, verified when read.

An artifact holds ``model.so``, ``weights.safetensors``, ``codecs.safetensors`` (rotations and codebooks),
``manifest.json`` and, if the model has one, ``tokenizer.json``; ``docs/artifact.md`` describes them. It is first
written beside its final place and then renamed, so the final name never shows a half-written artifact.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy learns bfloat16 from it)
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from rotquant_tvm.artifact_folder import MANIFEST_FILE, check_output
from rotquant_tvm.errors import ArtifactError, DeviceError, UsageError
from rotquant_tvm.runtime.cache_info import KVCacheInfo
from rotquant_tvm.runtime.codec_file import CODECS_FILE, CodecData, read_codecs
from rotquant_tvm.runtime.manifest import (
    LIBRARY_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    FileRecord,
    Manifest,
    TokenizerSpec,
)
from rotquant_tvm.runtime.requirements import Requirements
from rotquant_tvm.staging import is_disk_full, move_into_place, staging_folder, write_error


@dataclass(frozen=True)
class Artifact:
    """A verified artifact on disk."""

    path: Path
    manifest: Manifest

    @property
    def library_path(self) -> Path:
        """The compiled library."""
        return self.path / LIBRARY_FILE

    def tokenizer_json(self) -> str | None:
        """Return the text of ``tokenizer.json``, or None if the artifact has no tokenizer."""
        if TOKENIZER_FILE not in self.manifest.files:
            return None
        with _damage(self.path / TOKENIZER_FILE):
            return (self.path / TOKENIZER_FILE).read_text(encoding="utf-8")

    def codecs(self) -> CodecData | None:
        """Return the rotations and codebooks of the cache, each checked, or None if the artifact has none of them."""
        if not self.manifest.codecs:
            return None
        return read_codecs(self.path / CODECS_FILE, self.manifest.codecs, f"{self.path / MANIFEST_FILE}: codecs")

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, array) in the order in which the library takes its weights.

        The file is memory-mapped and one array at a time is materialized. Raises ArtifactError if the file
        is damaged or lacks a weight.
        """
        path = self.path / WEIGHTS_FILE
        with _damage(path), safe_open(path, framework="np") as stored:
            missing = sorted(set(self.manifest.info.weights) - set(stored.keys()))
            if missing:
                raise ArtifactError(f"{path}: lacks {', '.join(missing[:3])}; compile the model again")
            for name in self.manifest.info.weights:
                yield name, stored.get_tensor(name)


def write_artifact(
    path: str | os.PathLike[str],
    library: bytes | Callable[[str], object],
    weights: Mapping[str, np.ndarray],
    *,
    kv_cache_info: Mapping[str, Any],
    target: str | Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
    tokenizer_json: str | None = None,
    tokenizer: TokenizerSpec | None = None,
    default_capacity: int | None = None,
    requires: Requirements | None = None,
    model: Mapping[str, Any] | None = None,
    codecs: CodecData | None = None,
) -> Artifact:
    """Write an artifact at ``path``, replacing an artifact that is already there.

    ``library`` is the shared library's bytes or a function that writes it to the path it is given
    (``executable.export_library``). ``weights`` maps exactly the names in ``kv_cache_info["weights"]`` to
    arrays of any shape and dtype (bfloat16 by ml_dtypes). ``target`` is ``str(target)`` or a mapping with
    ``kind``, ``requires`` what it asks of a machine; ``model`` says what was compiled; ``codecs`` are the rotations and
    codebooks. The report's "tuning_records" become the manifest's. Raises UsageError if ``path`` cannot be written,
    holds something that is not an artifact, or the weights do not match their names; whatever ``library`` raises passes
    through. In every such case ``path`` is as it was before.
    """
    final = Path(path).resolve()
    info = KVCacheInfo.from_document(dict(kv_cache_info))
    if set(weights) != set(info.weights):
        odd = sorted(set(weights) ^ set(info.weights))
        raise UsageError(f"weights and kv_cache_info['weights'] disagree about {', '.join(odd[:3])}")
    check_output(final)
    needed = sum(np.asarray(array).nbytes for array in weights.values())
    try:
        with staging_folder(final) as partial:
            _write_library(partial / LIBRARY_FILE, library)
            needed += (partial / LIBRARY_FILE).stat().st_size
            safetensors.numpy.save_file(
                {name: np.asarray(weights[name], order="C") for name in info.weights}, partial / WEIGHTS_FILE
            )
            if codecs is not None:
                codecs.write(partial / CODECS_FILE)
            if tokenizer_json is not None:
                (partial / TOKENIZER_FILE).write_text(tokenizer_json, encoding="utf-8")
            manifest = Manifest(
                info=info,
                target=target,
                requires=requires,
                model=dict(model or {}),
                tuning_records=list((report or {}).get("tuning_records", ())),
                codecs={} if codecs is None else codecs.document(),
                files={file.name: _record(file) for file in sorted(partial.iterdir())},
                tokenizer=tokenizer or TokenizerSpec(),
                report=dict(report or {}),
                default_capacity=default_capacity,
            )
            (partial / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
            # safetensors writes files for the owner's eyes only; an artifact is as readable as its manifest.
            for name in (WEIGHTS_FILE, *([] if codecs is None else [CODECS_FILE])):
                (partial / name).chmod((partial / MANIFEST_FILE).stat().st_mode)
            move_into_place(partial, final)
    except (OSError, SafetensorError, DeviceError) as error:
        if isinstance(error, DeviceError) and not is_disk_full(error):  # of the linker
            raise
        raise write_error(final, error, needed) from error
    return Artifact(final, manifest)


def read_artifact(path: str | os.PathLike[str], verify: bool = True) -> Artifact:
    """Open the artifact at ``path``.

    Sizes are always checked; with ``verify`` the SHA-256 of every file too (about a second per GB). Raises
    ArtifactError naming the file that is missing, damaged or of another version, and what to do.
    """
    folder = Path(path)
    where = folder / MANIFEST_FILE
    with _damage(folder):
        if not folder.is_dir():
            what = "is a file, not an artifact folder" if folder.exists() else "does not exist"
            raise ArtifactError(f"{folder} {what}; pass a folder written by tvmc compile")
        if not where.is_file():
            raise ArtifactError(f"{where} is missing; pass a folder written by tvmc compile")
    with _damage(where):
        manifest = Manifest.from_json(where.read_text(encoding="utf-8"), str(where))
    for name, record in manifest.files.items():
        with _damage(folder / name):
            _verify_file(folder / name, record, verify)
    return Artifact(folder, manifest)


def _verify_file(path: Path, record: FileRecord, verify: bool) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; copy the whole artifact folder or compile the model again")
    size = path.stat().st_size
    remedy = "copy the artifact again or compile the model again"
    if size != record.bytes:
        raise ArtifactError(f"{path} has {size} bytes instead of {record.bytes}; {remedy}")
    if verify and (found := _record(path).sha256) != record.sha256:
        raise ArtifactError(
            f"{path} is damaged: its SHA-256 is {found}, and the manifest says {record.sha256}; {remedy}"
        )


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _write_library(path: Path, library: bytes | Callable[[str], object]) -> None:
    if isinstance(library, bytes):
        path.write_bytes(library)
    else:
        library(str(path))


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what reading a damaged or unreadable file raises into an ArtifactError naming it."""
    try:
        yield
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); compile the model again") from error
