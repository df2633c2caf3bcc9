"""What a .pt2 file must look like before torch is let near it."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.error_text import first_line

MODEL = "models/model.json"
WEIGHTS = "data/weights/"
CONSTANTS = "data/constants/"
SAMPLES = "data/sample_inputs/model.pt"
CONFIGS = {WEIGHTS: WEIGHTS + "model_weights_config.json", CONSTANTS: CONSTANTS + "model_constants_config.json"}

_SPARE_ELEMENTS = 1 << 22
"""What small tensors may be repeated to, by strides of 0."""

_SAVE_AGAIN = "save the program again with torch.export.save"
_OLD = ("serialized_exported_program.json", "serialized_state_dict.pt", "serialized_state_dict.json")
_FOREIGN = {
    "data/aotinductor/": "holds machine code (an AOTInductor package), which is not run; save the exported program",
    "data/executorch/": "is an ExecuTorch package; save the exported program",
}


def check_pt2(path: Path) -> set[str]:
    """Return the names of the records of a .pt2 file, without their common folder.

    Only the directory and the checksums are read. Raises ModelError for a file that is damaged, cut short,
    compressed, or no exported program saved by torch 2.8 or later.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            _check_records(path, records)
            damaged = archive.testzip()
    except (OSError, ValueError, RuntimeError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}; it is damaged or cut short") from error
    if damaged is not None:
        raise ModelError(f"{path} is damaged: the checksum of {damaged!r} is wrong")
    names = {record.filename.partition("/")[2] for record in records}
    for folder, reason in _FOREIGN.items():
        if any(name.startswith(folder) for name in names):
            raise ModelError(f"{path} {reason} with torch.export.save")
    if any(record.filename.endswith(_OLD) for record in records):
        raise ModelError(f"{path} was saved by torch 2.7 or older; load it there and {_SAVE_AGAIN} of a later one")
    if missing := sorted({MODEL, *CONFIGS.values()} - names):
        models = sorted(name for name in names if name.startswith("models/"))
        found = f" (it holds {', '.join(models)})" if models and missing == [MODEL] else ""
        raise ModelError(f"{path} lacks {missing[0]}{found}; {_SAVE_AGAIN}")
    return names


def _check_records(path: Path, records: list[zipfile.ZipInfo]) -> None:
    """Refuse what torch never writes: two records of a name, compression, encryption, several top folders."""
    names = [record.filename for record in records]
    if len(set(names)) < len(names) or len({name.partition("/")[0] for name in names}) != 1:
        raise ModelError(f"{path} is not an archive that torch wrote: its records are not all in one folder, each once")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise ModelError(f"{path}: {record.filename!r} is compressed or encrypted, which torch never writes")
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise ModelError(f"{path} claims to hold more than its own size")


def check_payloads(path: Path, folder: str, config: dict[str, Any], sizes: dict[str, int]) -> None:
    """Check the list of tensors of a folder; ``sizes`` gives the bytes of every record of the archive.

    Raises ModelError for a tensor that is pickled, lies outside of the folder or is larger than its record, and for
    tensors that repeat their bytes to far more than the archive has.
    """
    total, most = 0, _SPARE_ELEMENTS + 4 * sum(sizes.values())
    for name, entry in config["config"].items():
        record, meta = entry["path_name"], entry["tensor_meta"]
        if entry["use_pickle"] or meta is None or not record.startswith(("weight_", "tensor_")) or "/" in record:
            raise ModelError(
                f"{path}: {name!r} is stored as a pickle, which may run code; export a model of plain tensors"
            )
        if folder + record not in sizes:
            raise ModelError(f"{path} lacks {folder + record}, the values of {name!r}")
        elements = _extent(path, name, meta)
        if elements * 1 > sizes[folder + record]:  # at least one byte each; torch checks the rest
            raise ModelError(f"{path}: {name!r} is larger than the record that holds it")
        total += math.prod(size["as_int"] for size in meta["sizes"])
        if total > most:
            raise ModelError(f"{path}: {name!r} and those before it have more than {most} elements; it is damaged")


def _extent(path: Path, name: str, meta: dict[str, Any]) -> int:
    """Elements from the start of a record to the end of the tensor in it."""
    numbers = [[size.get("as_int") for size in meta[key]] for key in ("sizes", "strides")]
    offset = meta["storage_offset"].get("as_int")
    if not all(isinstance(number, int) and number >= 0 for number in (*numbers[0], *numbers[1], offset)):
        raise ModelError(f"{path}: {name!r} has a size that is not a number of 0 or more")
    if 0 in numbers[0]:
        return 0
    extent: int = offset + 1 + sum((size - 1) * stride for size, stride in zip(*numbers, strict=True))
    return extent


def parse(path: Path, record: str, text: bytes) -> dict[str, Any]:
    """Read a JSON record. Raises ModelError if it is none."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {record} is no JSON: {first_line(error)}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{path}: {record} is not a JSON object")
    return document
