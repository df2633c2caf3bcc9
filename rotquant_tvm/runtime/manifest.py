"""The manifest of an artifact: what ``manifest.json`` holds, written, parsed and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rotquant_tvm.artifact_folder import FORMAT
from rotquant_tvm.errors import ArtifactError
from rotquant_tvm.runtime.cache_info import KVCacheInfo, check_version, entry, positive

VERSION = 1
LIBRARY_FILE = "model.so"
WEIGHTS_FILE = "weights.safetensors"
TOKENIZER_FILE = "tokenizer.json"
KNOWN_FILES = (LIBRARY_FILE, WEIGHTS_FILE, TOKENIZER_FILE)


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

    ``target``: what the library was compiled for, as ``str(tvm.target.Target)`` or a mapping with ``kind``;
    ``tvm``: the version of TVM that compiled it; ``report``: the compile report, any JSON object;
    ``default_capacity``: tokens per sequence of a session that names none.
    """

    info: KVCacheInfo
    target: str | Mapping[str, Any]
    tvm: str
    files: Mapping[str, FileRecord]
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
            "kv_cache_info": self.info.document,
            "target": self.target,
            "tvm": self.tvm,
            "files": {name: vars(record) for name, record in self.files.items()},
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
        except ValueError as error:
            raise ArtifactError(f"{where}: not valid JSON ({error}); compile the model again") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ArtifactError(
                f"{where}: not the manifest of a {FORMAT}; pass a folder written by tvmc compile"
            )
        check_version(document, "version", (VERSION,), where)
        if "checksum" in document and document["checksum"] != _checksum(document):
            raise ArtifactError(f"{where}: its content does not match its checksum; compile the model again")
        capacity = document.get("default_capacity")
        return cls(
            info=KVCacheInfo.from_document(
                entry(document, "kv_cache_info", dict, where), f"{where}: kv_cache_info"
            ),
            target=entry(document, "target", str | dict, where),
            tvm=entry(document, "tvm", str, where),
            files=_file_records(entry(document, "files", dict, where), where),
            tokenizer=_tokenizer(document.get("tokenizer"), where),
            report=entry(document, "report", dict, where),
            default_capacity=None if capacity is None else positive(document, "default_capacity", where),
        )


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
