"""The manifest of an artifact: what ``manifest.json`` holds, written, parsed and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
import tvm_ffi

from rotquant_tvm import __version__
from rotquant_tvm.artifact_folder import FORMAT
from rotquant_tvm.errors import ArtifactError
from rotquant_tvm.runtime.cache_info import KVCacheInfo, check_version, entry, positive
from rotquant_tvm.runtime.codec_file import CODECS_FILE
from rotquant_tvm.runtime.requirements import Requirements

VERSION = 2
"""Version 2 has the codecs as data, what a machine must have, the model, the versions and the tuning records."""
LIBRARY_FILE = "model.so"
WEIGHTS_FILE = "weights.safetensors"
TOKENIZER_FILE = "tokenizer.json"
KNOWN_FILES = (LIBRARY_FILE, WEIGHTS_FILE, CODECS_FILE, TOKENIZER_FILE)
_MUST_AGREE = ("tvm", "tvm-ffi")
"""Packages whose first two numbers must be those that the library was compiled with."""


def this_release() -> dict[str, str]:
    """The versions that an artifact written here names."""
    return {"rotquant-tvm": __version__, "tvm": str(tvm.__version__), "tvm-ffi": str(tvm_ffi.__version__)}


@dataclass(frozen=True)
class TokenizerSpec:
    """What generation must know beside ``tokenizer.json``.

    ``eos_token_ids``: tokens that end a generation, the tokenizer's own EOS first. ``bos_token_id``:
    the token that opens a sequence, if the model has one. ``chat_template``: a Jinja template in
    Hugging Face's dialect.
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file of the artifact."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    ``target``: what the library was compiled for, as ``str(tvm.target.Target)`` or a mapping with ``kind``, and
    ``requires``: what that asks of a machine (None: not known); ``versions``: of the packages that compiled it;
    ``model``: what was compiled (type, name, format), ``tuning_records``: the records that its kernels are from,
    ``codecs``: which arrays of ``codecs.safetensors`` each layer uses (empty: there is no such file), and ``report``:
    the compile report, all plain data; ``default_capacity``: tokens per sequence of a session that names none.
    """

    info: KVCacheInfo
    target: str | Mapping[str, Any]
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str] = field(default_factory=this_release)
    requires: Requirements | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    tuning_records: Sequence[Mapping[str, Any]] = ()
    codecs: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerSpec = TokenizerSpec()
    report: Mapping[str, Any] = field(default_factory=dict)
    default_capacity: int | None = None

    def to_json(self) -> str:
        """Write the manifest as JSON, closed by a checksum over its own content."""
        tokenizer = {
            "file": TOKENIZER_FILE if TOKENIZER_FILE in self.files else None,
            "eos_token_ids": list(self.tokenizer.eos_token_ids),
            "bos_token_id": self.tokenizer.bos_token_id,
            "chat_template": self.tokenizer.chat_template,
        }
        document = {
            "format": FORMAT,
            "version": VERSION,
            "versions": dict(self.versions),
            "model": dict(self.model),
            "kv_cache_info": self.info.document,
            "target": self.target,
            "requires": None if self.requires is None else self.requires.document(),
            "tuning_records": [dict(record) for record in self.tuning_records],
            "files": {name: vars(record) for name, record in self.files.items()},
            "codecs": dict(self.codecs),
            "report": self.report,
            "tokenizer": tokenizer,
            "default_capacity": self.default_capacity,
        }
        document["checksum"] = _checksum(document)
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Parse and check ``text``; ``where`` is the file's path, for messages. Raises ArtifactError."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{where}: not valid JSON ({error}); compile the model again") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ArtifactError(
                f"{where}: not the manifest of a {FORMAT}; pass a folder written by tvmc compile"
            )
        check_version(document, "version", (VERSION,), where)
        if "checksum" in document and document["checksum"] != (found := _checksum(document)):
            raise ArtifactError(
                f"{where}: its content has the checksum {found} and not {document['checksum']}, as it says itself; "
                "copy the artifact again or compile the model again"
            )
        capacity, requires = document.get("default_capacity"), entry(document, "requires", dict | None, where)
        files = _file_records(entry(document, "files", dict, where), where)
        codecs = entry(document, "codecs", dict, where)
        if bool(codecs) != (CODECS_FILE in files):
            raise ArtifactError(f"{where}: 'codecs' and the list of files disagree; compile the model again")
        return cls(
            info=KVCacheInfo.from_document(
                entry(document, "kv_cache_info", dict, where), f"{where}: kv_cache_info"
            ),
            target=entry(document, "target", str | dict, where),
            files=files,
            versions=_versions(document, where),
            requires=None if requires is None else Requirements.from_document(requires, f"{where}: requires"),
            model=entry(document, "model", dict, where),
            tuning_records=_records(document, where),
            codecs=codecs,
            tokenizer=_tokenizer(document.get("tokenizer"), where),
            report=entry(document, "report", dict, where),
            default_capacity=None if capacity is None else positive(document, "default_capacity", where),
        )


def _versions(document: Mapping[str, Any], where: str) -> dict[str, str]:
    """The versions that the library was compiled with; raises ArtifactError if they are not those of this process."""
    versions: dict[str, str] = entry(document, "versions", dict, where)
    here = this_release()
    for name in _MUST_AGREE:
        version = entry(versions, name, str, f"{where}: versions")
        if version.split(".")[:2] != here[name].split(".")[:2]:
            raise ArtifactError(
                f"{where}: compiled with {name} {version}, and here is {name} {here[name]}; compile the model again, "
                f"or install {name} {'.'.join(version.split('.')[:2])}"
            )
    return versions


def _records(document: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = entry(document, "tuning_records", list, where)
    if not all(isinstance(record, dict) for record in records):
        raise ArtifactError(f"{where}: 'tuning_records' is no list of objects; compile the model again")
    return records


def _checksum(document: Mapping[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key != "checksum"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _file_records(files: Mapping[str, Any], where: str) -> dict[str, FileRecord]:
    for name in (LIBRARY_FILE, WEIGHTS_FILE):
        if name not in files:
            raise ArtifactError(f"{where}: lists no {name}; compile the model again")
    records = {}
    for name, record in files.items():
        if name not in KNOWN_FILES or not isinstance(record, dict):
            raise ArtifactError(
                f"{where}: lists a file {name!r} that no artifact has; compile the model again"
            )
        inside = f"{where}: files[{name!r}]"
        records[name] = FileRecord(
            positive(record, "bytes", inside), entry(record, "sha256", str, inside).lower()
        )
    return records


def _tokenizer(document: object, where: str) -> TokenizerSpec:
    if document is None:
        return TokenizerSpec()
    inside = f"{where}: tokenizer"
    if not isinstance(document, dict):
        raise ArtifactError(f"{inside} is no JSON object; compile the model again")
    eos = document.get("eos_token_ids", [])
    bos = document.get("bos_token_id")
    template = document.get("chat_template")
    if not isinstance(eos, list) or not all(isinstance(token, int) for token in eos):
        raise ArtifactError(f"{inside}: eos_token_ids is {eos!r}, expected integers; compile the model again")
    if not isinstance(bos, int | None) or not isinstance(template, str | None):
        raise ArtifactError(f"{inside}: bos_token_id or chat_template is malformed; compile the model again")
    return TokenizerSpec(tuple(eos), bos, template)
