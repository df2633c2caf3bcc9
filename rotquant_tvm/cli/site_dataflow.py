"""The dataflow around one attention site as a graph: from the linear layers before it to the one behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import networkx as nx

if TYPE_CHECKING:
    import tvm
    from tvm import relax

    from rotquant_tvm.passes.feature_probe import FeatureProbe

KINDS = ("attention", "kernel", "operator", "weight", "cache", "input")
"""What a node can be, its data ``kind``: a kernel is one of this project's."""

_CACHES = ("cache", "centre", "plain", "past")
_ATTENTIONS = ("attention_dense", "attention_prefill", "attention_decode")
_WEIGHTS_OF = ("matmul",)


def site_dataflow(mod: tvm.IRModule, function: str, index: int) -> nx.DiGraph:
    """Return the graph around attention ``index`` of a function: "main" of an importer, or one the passes have made.

    Nodes are numbers, with the data ``kind`` (one of ``KINDS``), ``label`` and ``detail`` (name and type). Edges go
    from producer to user. What only places tokens (lengths, positions) is left out or one input. Raises IndexError if
    there is no such attention.
    """
    return _Surroundings(mod, function).around(index)


class _Surroundings:
    def __init__(self, mod: tvm.IRModule, function: str) -> None:
        from rotquant_tvm.passes.feature_probe import FeatureProbe
        from rotquant_tvm.passes.folded_weights import weight_rotations
        from rotquant_tvm.passes.weight_recipes import num_input

        self.mod, self.func = mod, mod[function]
        self.probe: FeatureProbe = FeatureProbe(self.func)
        weights = self.func.params[num_input(self.func) :]
        self.weights = {weight: i for i, weight in enumerate(weights)}
        self.rotated = {record.weight for record in weight_rotations(self.func)}
        self.graph = nx.DiGraph()
        self.numbers: dict[relax.Expr, int] = {}

    def around(self, index: int) -> nx.DiGraph:
        """Walk back from the attention to weights and caches, and on to the next linear layer."""
        attention = [var for var in self.probe.graph.nodes if self._is_attention(var)][index]
        self._back(attention)
        waiting = [attention]
        while waiting:
            var = waiting.pop()
            for reader in self._readers(var):
                known = reader in self.numbers
                self.graph.add_edge(self._node(var), self._node(reader))
                if self._name(reader) in _WEIGHTS_OF:
                    self._back(reader, skip=var)
                elif not known and (self.probe.only_moves(reader) or self._name(reader) == "rotate"):
                    waiting.append(reader)
        return self.graph

    def _back(self, start: relax.Expr, skip: relax.Expr | None = None) -> None:
        """Add what goes into a variable; a linear layer's input is a leaf."""
        waiting, seen = [start], {start}
        self._node(start)
        while waiting:
            var = waiting.pop()
            for number, operand in enumerate(self._operands(var)):
                if skip is not None and self._resolved(skip).same_as(operand):
                    continue
                leaf = self._is_leaf(operand) or (self._name(var) in _WEIGHTS_OF and number == 0)
                self.graph.add_edge(self._node(operand, leaf), self._node(var))
                if not leaf and operand not in seen:
                    seen.add(operand)
                    waiting.append(operand)

    def _resolved(self, var: relax.Expr) -> relax.Expr:
        """The variable behind renamings, parts of tuples, and a weight's transpositions."""
        from tvm import relax

        while True:
            value = self.probe.value(var)
            if isinstance(value, relax.Var):
                var = value
            elif isinstance(value, relax.TupleGetItem):
                var = value.tuple_value
            elif self._operator(var) in ("permute_dims", "astype") and self._weight_behind(value.args[0]):
                var = value.args[0]
            else:
                return var

    def _weight_behind(self, var: relax.Expr) -> bool:
        while self._operator(var) in ("permute_dims", "astype"):
            var = self.probe.value(var).args[0]
        return var in self.weights

    def _operands(self, var: relax.Expr) -> Iterator[relax.Expr]:
        """The tensors that a variable's value reads, resolved; counts of tokens are passed over."""
        from tvm import relax

        value = self.probe.value(var)
        args: list[Any] = list(value.args) if isinstance(value, relax.Call) else []
        if self._operator(var).startswith("call_tir"):
            args = list(args[1].fields)
        elif self._operator(var) == "concat":
            args = list(args[0].fields)
        for arg in args:
            if isinstance(arg, relax.Var) and isinstance(arg.ty, relax.TensorType):
                found = self._resolved(arg)
                if not str(getattr(found.ty, "dtype", "")).startswith("int"):
                    yield found

    def _readers(self, var: relax.Var) -> Iterator[relax.Var]:
        for reader in self.probe.readers(var):
            if self._resolved(reader).same_as(reader):
                yield reader
            else:
                yield from self._readers(reader)

    def _is_leaf(self, var: relax.Expr) -> bool:
        """Whether a variable is shown without what goes into it: a parameter, or made of positions alone."""
        cached = any(p in self.probe.graph and nx.has_path(self.probe.graph, p, var) for p in self._cache_params())
        return self.probe.value(var) is None or not (var in self.probe.ids_dependent or cached)

    def _cache_params(self) -> list[relax.Var]:
        return [param for param in self.func.params if param.name.startswith(_CACHES)]

    def _operator(self, var: relax.Expr) -> str:
        operator: str = self.probe.operator(var)
        return operator

    def _kernel(self, var: relax.Expr) -> str:
        from rotquant_tvm.passes.kv_kernels import kernel_of

        value = self.probe.value(var)
        kernel = kernel_of(self.mod, value) if value is not None else None
        return kernel[0] if kernel is not None else ""

    def _name(self, var: relax.Expr) -> str:
        return self._kernel(var) or self._operator(var)

    def _is_attention(self, var: relax.Expr) -> bool:
        return self._kernel(var) in _ATTENTIONS or self._operator(var) in ("nn.attention", "nn.attention_bias")

    def _node(self, var: relax.Expr, leaf: bool = False) -> int:
        if var not in self.numbers:
            self.numbers[var] = len(self.numbers)
            kind, label = self._described(var, leaf)
            detail = f"{getattr(var, 'name', 'constant')}: {var.ty}"
            self.graph.add_node(self.numbers[var], kind=kind, label=label, detail=" ".join(detail.split()))
        return self.numbers[var]

    def _described(self, var: relax.Expr, leaf: bool) -> tuple[str, str]:
        """(kind, label) of a node."""
        if var in self.weights:
            rotated = " · rotated" if self.weights[var] in self.rotated else ""
            return "weight", _short(var.name) + rotated
        if self.probe.value(var) is None:
            return ("cache" if var.name.startswith(_CACHES) else "input"), str(var.name)
        name = self._name(var)
        if self._is_attention(var):
            return "attention", name
        if self._is_leaf(var):
            return "input", f"{name} of positions" if var in self._positioned() else name
        if leaf:
            return "input", f"{name} (hidden states)"
        return ("kernel" if self._kernel(var) else "operator"), name or "tuple"

    def _positioned(self) -> set[relax.Var]:
        """What positions or the sequences' lengths, of which positions are made, have gone into."""
        starts = [p for p in self.func.params if p.name in ("positions", "lengths", "new_lengths")]
        return {var for start in starts for var in nx.descendants(self.probe.graph, start)}


def _short(name: str) -> str:
    """A weight parameter's name without what all have in common: ``layers_0_self_attn_q_proj``."""
    for prefix in ("p_model_model_", "p_model_transformer_", "p_model_"):
        name = name.removeprefix(prefix)
    return name.removesuffix("_weight")
