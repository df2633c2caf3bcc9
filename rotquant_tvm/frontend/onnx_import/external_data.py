"""Weights in files beside the model: mapped, never read whole, and only from the model's own folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from rotquant_tvm.errors import ModelError

if TYPE_CHECKING:
    import onnx


class ExternalData:
    """The data files of one model; each is mapped once."""

    def __init__(self, model: Path) -> None:
        """Take the path of the model file. Where it is a link, the folder of the file behind it counts as its own."""
        self.folder = model.parent
        self.roots = (model.parent.resolve(), model.resolve().parent)
        self._maps: dict[Path, np.ndarray[Any, Any]] = {}

    def array(self, tensor: onnx.TensorProto, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """A view of a tensor's bytes in its file.

        Raises ModelError if the file is outside the model's folder, missing, or too short, or the size is wrong.
        """
        entries = {entry.key: entry.value for entry in tensor.external_data}
        wanted = int(np.prod(shape, dtype=object)) * dtype.itemsize
        try:
            offset, length = int(entries.get("offset") or 0), int(entries.get("length") or wanted)
        except ValueError as error:
            raise ModelError(f"the tensor {tensor.name!r}: its external offset or length is no number") from error
        if length != wanted or offset < 0:
            raise ModelError(
                f"the tensor {tensor.name!r} of shape {list(shape)} needs {wanted} bytes, and its external data "
                f"has {length} from {offset}; the file is damaged"
            )
        if not wanted:
            return np.zeros(shape, dtype)
        path = self.path(tensor.name, entries.get("location", ""))
        data = self._mapped(tensor.name, path)
        if offset + length > data.size:
            raise ModelError(
                f"{path} is too short: the tensor {tensor.name!r} ends at byte {offset + length} and the file has "
                f"{data.size}; download it again"
            )
        piece = data[offset : offset + length]
        if piece.ctypes.data % dtype.itemsize:
            piece = piece.copy()
        return piece.view(dtype).reshape(shape)

    def path(self, name: str, location: str) -> Path:
        """The file of a tensor's location; raises ModelError unless it lies in the model's folder, links followed."""
        relative = PurePosixPath(location)
        outside = (
            not location
            or "\0" in location
            or relative.is_absolute()
            or PureWindowsPath(location).drive
            or "\\" in location
            or ".." in relative.parts
        )
        path = self.folder / relative
        if not outside:
            real = path.resolve()
            outside = not any(real.is_relative_to(root) for root in self.roots)
        if outside:
            raise ModelError(
                f"the tensor {name!r} has its data in {location[:200]!r}, outside the model's folder, which is "
                "refused; put the data file beside the model"
            )
        return path

    def _mapped(self, name: str, path: Path) -> np.ndarray[Any, Any]:
        if path not in self._maps:
            if not path.is_file():
                raise ModelError(f"the tensor {name!r} has its data in {path}, which does not exist; put it there")
            try:
                # A plain view: a slice of np.memmap would keep that class.
                self._maps[path] = np.asarray(np.memmap(path, np.uint8, "r")).view(np.ndarray)
            except (OSError, ValueError) as error:
                raise ModelError(f"{path} cannot be read: {error}") from error
        return self._maps[path]
