"""The graph's inputs as parameters: names of dynamic sizes read as expressions, and sizes that mean the same made one.

Exporters name sizes as they like: one name for the batch in every input or a name of its own in each, the length of
the mask as "past + seq", as a name of its own or not at all. The sizes of a decoder's inputs follow from what they are:
ids [batch, seq], pasts [batch, kv_heads, past, head_dim], masks [batch, past + seq] or [batch, 1, seq, past + seq].
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx
import tvm
from tvm import relax, tirx

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.onnx_import.size_names import parse_size
from rotquant_tvm.frontend.onnx_import.tensors import MAX_RANK, dtype_name

if TYPE_CHECKING:
    from rotquant_tvm.frontend.onnx_import.model_file import OnnxFile

_MAX_SIZE = 1 << 40
_POSITION_NAMES = ("position_ids", "positions", "position_id", "pos_ids")


@dataclass(frozen=True)
class Inputs:
    """A graph's inputs.

    Attributes: ``params`` (name → parameter, in the file's order), ``size_vars`` (the dynamic sizes), ``ids`` and
    ``positions`` (their parameters, if the graph has them), ``spare_positions`` (a parameter to add where there is
    none and ids tell its shape) and ``total``, the length of past and new tokens together, where ids are known.
    """

    params: dict[str, relax.Var]
    size_vars: list[tirx.Var]
    ids: relax.Var | None
    positions: relax.Var | None
    spare_positions: relax.Var | None
    total: Any


@dataclass
class _Declared:
    """An input before it is a parameter; ``written`` holds ints and names of sizes, ``sizes`` their meaning."""

    name: str
    dtype: str
    written: list[int | str]
    sizes: list[Any] = field(default_factory=list)

    def read(self, variables: dict[str, Any]) -> None:
        """Set the sizes to what the names of ``variables`` mean."""
        self.sizes = [parse_size(size, variables) if isinstance(size, str) else size for size in self.written]

    @property
    def is_integer(self) -> bool:
        return self.dtype in ("int32", "int64")

    @property
    def is_mask(self) -> bool:
        return "mask" in self.name.lower() and len(self.sizes) in (2, 4)

    @property
    def is_past(self) -> bool:
        """[batch, kv_heads, past, head_dim], or keys and values in one [2, batch, kv_heads, past, head_dim]."""
        floats = self.dtype in ("float32", "float16", "bfloat16")
        last = self.sizes[-1:] + self.sizes[-3:-2]
        return floats and len(self.sizes) in (4, 5) and not self.is_mask and all(isinstance(s, int) for s in last)


def declare_inputs(file: OnnxFile) -> Inputs:
    """Make parameters of a graph's inputs. Raises ModelError for an input that is no tensor of known rank."""
    declared = [_declare(file.source, value) for value in file.graph_inputs]
    variables: dict[str, Any] = {}
    for each in declared:
        each.read(variables)
    ids = _find_ids(declared)
    total = _unify(declared, ids, variables) if ids is not None else None
    _own_sizes(declared)
    params = {each.name: _param(each.name, each.sizes, each.dtype) for each in declared}
    bare = {size for each in declared for size in each.sizes if isinstance(size, tirx.Var)}
    positions = next((params[name] for name in _POSITION_NAMES if name in params), None)
    spare = None
    if ids is not None and positions is None:
        spare = _param("position_ids", ids.sizes, "int64")
    return Inputs(
        params, sorted(bare, key=lambda v: v.name), params[ids.name] if ids else None, positions, spare, total
    )


def _param(name: str, sizes: list[Any], dtype: str) -> relax.Var:
    return relax.Var(name, relax.TensorType(sizes, dtype))


def _declare(source: str, value: onnx.ValueInfoProto) -> _Declared:
    where = f"{source}: the input {value.name!r}"
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        raise ModelError(f"{where} is no tensor of a known number of axes; export the model again with its shapes")
    try:
        dtype = dtype_name(tensor.elem_type)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    if len(tensor.shape.dim) > MAX_RANK:
        raise ModelError(f"{where} has {len(tensor.shape.dim)} axes")
    sizes: list[int | str] = []
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.HasField("dim_value") and not 0 <= dim.dim_value <= _MAX_SIZE:
            raise ModelError(f"{where} has the impossible size {dim.dim_value} along axis {axis}")
        sizes.append(int(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_{axis}")
    return _Declared(value.name, dtype, sizes)


def _find_ids(declared: list[_Declared]) -> _Declared | None:
    """The token ids: by their usual name, else the only integers [batch, seq] that are neither mask nor positions."""
    matrices = [each for each in declared if each.is_integer and len(each.sizes) == 2]
    named = [each for each in matrices if each.name == "input_ids"]
    others = [each for each in matrices if not each.is_mask and each.name not in _POSITION_NAMES]
    return next(iter(named or others), None)


def _unify(declared: list[_Declared], ids: _Declared, variables: dict[str, Any]) -> Any:
    """Replace sizes that have names of their own by those of ids and pasts. Returns the total length."""
    batch, seq = ids.sizes
    pasts = [each for each in declared if each.is_past]
    past = pasts[0].sizes[-2] if pasts else 0
    total = past + seq
    wanted: list[tuple[Any, Any]] = []
    for each in pasts:
        wanted += [(each.sizes[-4], batch), (each.sizes[-2], past)]
    masks = [each for each in declared if each.is_mask]
    for each in masks:
        wanted += [(each.sizes[0], batch)] + ([(each.sizes[2], seq)] if len(each.sizes) == 4 else [])
    for each in declared:
        if each.name in _POSITION_NAMES:
            wanted += [(each.sizes[0], batch), (each.sizes[-1], seq)]
    _replace(declared, wanted, (batch, seq, past), variables)
    everywhere, in_masks = _counts(declared), _counts(masks)
    own = [name for name, count in in_masks.items() if count == everywhere[name]]
    lengths = [(each.sizes[-1], total) for each in masks if getattr(each.sizes[-1], "name", None) in own]
    _replace(declared, lengths, (batch, seq, past), variables)
    return total


def _counts(declared: list[_Declared]) -> Counter[str]:
    return Counter(size.name for each in declared for size in each.sizes if isinstance(size, tirx.Var))


def _replace(declared: list[_Declared], wanted: list[tuple[Any, Any]], fixed: Any, variables: dict[str, Any]) -> None:
    """Let the first of each pair, where it is a variable of its own, mean the second."""
    kept = [size for size in fixed if isinstance(size, tirx.Var)]
    for old, new in wanted:
        if isinstance(old, tirx.Var) and not any(old.same_as(size) for size in kept):
            variables.update({name: new for name, size in variables.items() if old.same_as(size)})
    for each in declared:
        each.read(variables)


def _own_sizes(declared: list[_Declared]) -> None:
    """Give a fresh variable to expressions in variables that are no parameter's size: nothing would define them."""
    bare = {size for each in declared for size in each.sizes if isinstance(size, tirx.Var)}
    for each in declared:
        for axis, size in enumerate(each.sizes):
            if isinstance(size, tvm.ir.Expr) and not isinstance(size, tirx.Var):
                used = tirx.analysis.undefined_vars(size)
                if not all(var in bare for var in used):
                    each.sizes[axis] = tirx.Var(f"{each.name}_{axis}", "int64")
