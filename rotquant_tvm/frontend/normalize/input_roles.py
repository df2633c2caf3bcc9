"""What each input of a step is for, by what it is shaped like and who reads it; names break ties."""

from __future__ import annotations

import re
from dataclasses import dataclass

import tvm
from tvm import relax, tirx

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize.movement import WRITES, moves
from rotquant_tvm.frontend.normalize.size_arithmetic import Size, size_vars, substitute
from rotquant_tvm.frontend.normalize.step_view import StepView, dims, dtype_of, op_name
from rotquant_tvm.frontend.step_graph import StepGraph

IDS, POSITIONS, PADDING, MASK, PAST = "ids", "positions", "padding mask", "mask", "past"
PAST_LENGTH, TOTAL_LENGTH, LAST_INDEX, OTHER = "past length", "total length", "last index", "other"

MAX_BATCH = 1024
"""Sequences at most of a step whose batch is fixed: it is evaluated at its own size."""


@dataclass(frozen=True)
class InputRoles:
    """One role per input, in order, and the sizes that are one.

    Roles: IDS [batch, seq]; POSITIONS of the tokens, [batch, seq], [1, seq] or [seq]; PADDING [batch, total],
    true at real tokens; MASK [batch or 1, 1, seq, total]; PAST; scalars PAST_LENGTH and TOTAL_LENGTH; LAST_INDEX
    [batch], the index of the last real token of past and new ones; OTHER. ``sizes`` gives every symbolic size
    of the inputs in terms of ``batch``, ``seq`` and ``past``.
    """

    kinds: tuple[str, ...]
    sizes: dict[tirx.Var, Size]
    batch: Size
    seq: tirx.Var
    past: tirx.Var

    def of(self, kind: str, params: list[relax.Var]) -> list[relax.Var]:
        """The parameters with a role."""
        return [param for param, role in zip(params, self.kinds, strict=False) if role == kind]


def find_input_roles(graph: StepGraph, view: StepView) -> InputRoles:
    """Find the role of every input. Raises ModelError without token ids, or if the number of new tokens is fixed."""
    params = view.function.params[: len(graph.inputs)]
    ids = _find_ids(graph, view, list(params))
    batch, seq = dims(params[ids])
    if not isinstance(seq, tirx.Var):
        raise ModelError(
            f"{graph.source}: its input {graph.inputs[ids]!r} takes {seq} tokens per call and no other number; "
            "export it with a dynamic sequence length"
        )
    _check_batch(graph, graph.inputs[ids], batch)
    finder = _Roles(view, batch, seq)
    kinds = [""] * len(params)
    kinds[ids] = IDS
    for index, param in enumerate(params):
        if not kinds[index] and finder.is_past(param):
            kinds[index] = PAST
    finder.cached = PAST in kinds
    for index, param in enumerate(params):
        kinds[index] = kinds[index] or finder.role(param, graph.inputs[index].lower())
    return InputRoles(tuple(kinds), finder.sizes, finder.batch, finder.seq, finder.past)


def _check_batch(graph: StepGraph, name: str, batch: Size) -> None:
    """Refuse a number of sequences that no step has."""
    if isinstance(batch, int) and not 1 <= batch <= MAX_BATCH:
        raise ModelError(
            f"{graph.source}: its input {name!r} takes {batch} sequences per call, and 1 to {MAX_BATCH} are possible; "
            "export it with a dynamic batch"
        )
    if not isinstance(batch, (int, tirx.Var)):
        raise ModelError(f"{graph.source}: the batch of its input {name!r} is {batch}; export it with a dynamic batch")


def _find_ids(graph: StepGraph, view: StepView, params: list[relax.Var]) -> int:
    """The integer input [batch, seq] by which an embedding is looked up."""
    tables = {}
    for index, param in enumerate(params):
        if dtype_of(param) in ("int32", "int64") and len(dims(param) or []) == 2:
            rows = _looked_up(view, param)
            if rows:
                tables[index] = max(rows)
    if not tables:
        raise ModelError(f"{graph.source}: it takes no token ids: no integer input [batch, seq] looks up an embedding")
    widths = {dims(out)[-1] for out in view.outputs if len(dims(out) or []) in (2, 3)}
    choices = [
        [i for i in tables if re.search(r"(^|_)(ids|tokens?)$", graph.inputs[i].lower())
         and not re.search("position|type|mask", graph.inputs[i].lower())],
        [i for i in tables if tables[i] in widths],
        [i for i in tables if tables[i] == max(tables.values())],
    ]  # fmt: skip
    for found in [list(tables), *choices]:
        if len(found) == 1:
            return found[0]
    names = ", ".join(repr(graph.inputs[i]) for i in tables)
    raise ModelError(f"{graph.source}: any of the inputs {names} could be the token ids; name that one input_ids")


def _looked_up(view: StepView, param: relax.Var) -> list[int]:
    """Row counts of the tables that a parameter is the index of."""
    rows: list[int] = []
    waiting, seen = [param], set()
    while waiting:
        var = waiting.pop()
        if var in seen:
            continue
        seen.add(var)
        for reader in view.readers[var]:
            call = view.values[reader]
            if op_name(call) == "take" and call.args[1].same_as(var) and "float" in dtype_of(call):
                shape = dims(call.args[0])
                if shape and len(shape) == 2 and isinstance(shape[0], int):
                    rows.append(shape[0])
            elif moves(view, reader, var) or op_name(call) in ("clip", "maximum", "minimum", "where", "add"):
                waiting.append(reader)
    return rows


class _Roles:
    """Gives inputs their roles, and symbolic sizes their meaning as it goes."""

    def __init__(self, view: StepView, batch: Size, seq: tirx.Var) -> None:
        self.view, self.cached = view, False
        self.sizes: dict[tirx.Var, Size] = {}
        self.seq, self.past = tirx.Var("seq", "int64"), tirx.Var("past", "int64")
        self.batch: Size = tirx.Var("batch", "int64") if isinstance(batch, tirx.Var) else batch
        self.sizes[seq] = self.seq
        if isinstance(batch, tirx.Var):
            self.sizes[batch] = self.batch

    def is_past(self, param: relax.Var) -> bool:
        """Whether a parameter's elements are joined with others, or written over; learns its sizes from that."""
        shape = dims(param)
        if "float" not in dtype_of(param) or shape is None or len(shape) < 3 or self._is_mask(param):
            return False
        waiting, seen, found = [param], {param}, False
        while waiting:
            var = waiting.pop()
            for reader in self.view.readers[var]:
                call = self.view.values[reader]
                if op_name(call) == "concat":
                    found |= self._joined(call, var)
                elif reader not in seen and moves(self.view, reader, var):
                    seen.add(reader)
                    waiting.append(reader)
                elif op_name(call) in WRITES:
                    found |= call.args[0].same_as(var)
        # Everything that is shaped like a past is one, so that what is wrong with it is told of a past.
        found |= len(shape) >= 4 and any(isinstance(size, tirx.Var) for size in shape[1:])
        unknown = [size for size in shape if found and isinstance(size, tirx.Var) and size not in self.sizes]
        if len(unknown) == 1:
            self.sizes[unknown[0]] = self.past
        return found

    def _joined(self, call: relax.Call, past: relax.Var) -> bool:
        """Learn sizes from ``concat(past, new)``."""
        others = [part for part in call.args[0].fields if not part.same_as(past)]
        if len(others) != 1 or call.attrs.axis is None:
            return False
        old = dims(past)
        if old is None:
            return False
        axis = int(call.attrs.axis) % len(old)
        for place, (size, other) in enumerate(zip(old, dims(others[0]) or [None] * len(old), strict=True)):
            if not isinstance(size, tirx.Var) or size in self.sizes:
                continue
            if place == axis:
                self.sizes[size] = self.past
            elif other is not None and size_vars([other]) <= set(self.sizes):
                self.sizes[size] = other if isinstance(other, int) else substitute(other, self.sizes)
            elif place == 0:
                self.sizes[size] = self.batch
        return True

    def _is_mask(self, param: relax.Var) -> bool:
        """Whether an input is shaped like [batch or 1, 1, seq, total]."""
        shape = dims(param) or []
        return len(shape) == 4 and shape[1] == 1 and self.sizes.get(shape[2]) is self.seq

    def role(self, param: relax.Var, name: str) -> str:
        """The role of an input that is neither ids nor past."""
        shape, kind = dims(param), dtype_of(param)
        if shape is None:
            return OTHER
        if len(shape) == 4 and (self._is_mask(param) or "mask" in name):
            self._learn(shape, [self.batch, None, self.seq, self._total()])
            return MASK
        integer = "int" in kind
        if len(shape) == 2 and ("mask" in name or (not self._is_per_token(shape) and "position" not in name)):
            self._learn(shape, [self.batch, self._total()])
            return PADDING
        if integer and len(shape) == 2 and "position" in name:
            self._learn(shape, [self.batch, self.seq])
            return POSITIONS
        if integer and len(shape) == 1:
            return self._vector_role(shape, name)
        if integer and len(shape) == 0:
            return self._scalar_role(name)
        return OTHER

    def _vector_role(self, shape: list[Size], name: str) -> str:
        if "seqlen" in name:
            self._learn(shape, [self.batch])
            return LAST_INDEX
        if shape[0] == 1:
            return self._scalar_role(name)
        if isinstance(shape[0], tirx.Var) and (self._is_per_token(shape) or "pos" in name):
            self._learn(shape, [self.seq])
            return POSITIONS
        return OTHER

    @staticmethod
    def _scalar_role(name: str) -> str:
        if "total" in name:
            return TOTAL_LENGTH
        return PAST_LENGTH if re.search("past|position|start|offset|_pos$", name) else OTHER

    def _is_per_token(self, shape: list[Size]) -> bool:
        last = shape[-1]
        return isinstance(last, int) or self.sizes.get(last) is self.seq

    def _total(self) -> Size:
        return self.past + self.seq if self.cached else self.seq

    def _learn(self, shape: list[Size], meanings: list[Size | None]) -> None:
        for size, meaning in zip(shape, meanings, strict=True):
            if isinstance(size, tirx.Var) and meaning is not None:
                self.sizes.setdefault(size, meaning)


def with_named_sizes(mod: tvm.IRModule, roles: InputRoles) -> tvm.IRModule:
    """The module with the symbolic sizes of its inputs in terms of batch, seq and past; types are inferred anew."""
    result = tvm.IRModule({**mod.functions}, attrs=mod.attrs)
    known = {var: tirx.IntImm("int64", size) if isinstance(size, int) else size for var, size in roles.sizes.items()}
    result["main"] = mod["main"].bind_symbolic_vars(known)
    return result
