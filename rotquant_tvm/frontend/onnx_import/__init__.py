"""Importing ONNX decoders: ``read_onnx`` gives the step as the file spells it, ``import_onnx`` the canonical form."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rotquant_tvm.errors import ModelError, UsageError

if TYPE_CHECKING:
    from rotquant_tvm.frontend.imported_model import ImportedModel
    from rotquant_tvm.frontend.step_graph import StepGraph

__all__ = ["import_onnx", "onnx_data_files", "read_onnx"]


def read_onnx(path: Path) -> StepGraph:
    """Read an ONNX file as a StepGraph.

    Weights in the file's data files are mapped, not read. Raises ModelError if the file is damaged, if it has
    nodes that cannot be converted (all of them are named), or if the package onnx is missing.
    """
    _require_onnx(path)
    from rotquant_tvm.frontend.onnx_import.importer import import_file
    from rotquant_tvm.frontend.onnx_import.model_file import read_file

    if not path.is_file():
        raise ModelError(f"{path} does not exist; give an .onnx file")
    return import_file(read_file(path))


def onnx_data_files(path: Path) -> list[Path]:
    """The files of weights beside an ONNX file; raises ModelError as ``read_onnx``, and for one outside its folder."""
    _require_onnx(path)
    from rotquant_tvm.frontend.onnx_import.model_file import data_files

    return data_files(path)


def _require_onnx(path: Path) -> None:
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ModelError(f"reading {path} needs the package onnx: pip install 'rotquant-tvm[onnx]'") from error


def import_onnx(path: Path, *, dtype: str = "float32", every_logit: bool = False) -> ImportedModel:
    """Import an ONNX decoder in canonical form, with the tokenizer that lies beside it.

    The graph keeps its own dtype: "float32" asks for nothing, and another ``dtype`` must be that of most weights
    (UsageError). Raises ModelError as ``read_onnx``, and if the graph is no decoder whose attention can be told.
    """
    from rotquant_tvm.frontend.normalize import normalize_step
    from rotquant_tvm.frontend.tokenizer_files import folder_tokenizer

    graph = read_onnx(path)
    own = _main_dtype(graph)
    if dtype not in ("float32", own):
        raise UsageError(f"{path} is in {own} and keeps its dtype; leave dtype out, or convert the file to {dtype}")
    return normalize_step(graph, tokenizer=folder_tokenizer(path.parent), every_logit=every_logit)


def _main_dtype(graph: StepGraph) -> str:
    """The floating dtype of most of a graph's weights."""
    sizes: Counter[str] = Counter()
    for weight in graph.weights:
        if weight.dtype.name in ("float32", "float16", "bfloat16"):
            sizes[weight.dtype.name] += weight.size
    return max(sizes, key=sizes.__getitem__, default="float32")
