"""Loading of a program that ``torch.export.save`` wrote, without running any of its code.

``torch.export.load`` unpickles example inputs and whatever tensors ask for it, and evaluates text. Here tensors are
read as bytes, example inputs are not read, and the graph is checked before torch sees it (``pt2_document``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from rotquant_tvm.errors import ModelError, RotQuantError
from rotquant_tvm.frontend.error_text import first_line
from rotquant_tvm.frontend.pt2_document import cleaned
from rotquant_tvm.frontend.pt2_file import CONFIGS, MODEL, SAMPLES, check_payloads, check_pt2, parse
from rotquant_tvm.frontend.quiet import quiet


def load_program(path: Path) -> ExportedProgram:
    """Load an exported program, its tensors on the CPU.

    Raises ModelError for a file that is damaged, cut short, hostile or of another kind, in one line.
    """
    check_pt2(path)
    try:
        with quiet():
            reader = _Reader(path)
            return _deserialize(reader)
    except RotQuantError:
        raise
    except Exception as error:
        raise ModelError(f"{path} cannot be loaded: {first_line(error)}") from error


def _deserialize(reader: _Reader) -> ExportedProgram:
    try:
        from torch.export.pt2_archive._package import _load_exported_programs
    except ImportError as error:
        raise ModelError(
            f"torch {torch.__version__} loads .pt2 files in another way than is known here; load the program with "
            "torch.export.load if you trust it, and give it to rotquant_tvm.from_torch"
        ) from error
    _register(reader.containers)
    return _load_exported_programs(reader, [MODEL], None)["model"]  # type: ignore[arg-type]


def _register(containers: set[str]) -> None:
    """Tell torch of transformers' containers that a program takes or returns."""
    if any(name.startswith("transformers.") for name in containers):
        import transformers.modeling_outputs  # noqa: F401  # registers its own
        from transformers.integrations.executorch import register_dynamic_cache_export_support

        register_dynamic_cache_export_support()  # type: ignore[no-untyped-call]


class _Reader:
    """What torch's loader reads an archive with; the checked records stand for the stored ones."""

    def __init__(self, path: Path) -> None:
        self.archive_file = torch._C.PyTorchFileReader(str(path))
        names = self.archive_file.get_all_records()
        self.sizes = {name: self.archive_file.get_record_size(name) for name in names}
        program, self.containers = cleaned(path, self._parse(path, MODEL))
        self.checked = {MODEL: json.dumps(program).encode(), SAMPLES: b""}
        for folder, record in CONFIGS.items():
            config = self._parse(path, record)
            try:
                check_payloads(path, folder, config, self.sizes)
            except (KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{path}: {record} does not describe tensors") from error
            self.checked[record] = json.dumps(cleaned(path, config)[0]).encode()

    def _parse(self, path: Path, record: str) -> dict[str, Any]:
        return parse(path, record, self.archive_file.get_record(record))

    def read_bytes(self, name: str) -> bytes:
        """Return a record that was checked; no other is read as bytes."""
        if name not in self.checked:
            raise ModelError(f"{name} is not a record that is read")
        return self.checked[name]

    def read_string(self, name: str) -> str:
        """Return a checked record as text."""
        return self.read_bytes(name).decode()

    def get_file_names(self) -> list[str]:
        """Return the names of the records that were checked."""
        return list(self.checked)
