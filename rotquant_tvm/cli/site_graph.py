"""The attention sites of a model as a graph: the weights behind each site's query, key and value, and its readers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import networkx as nx

if TYPE_CHECKING:
    from tvm import relax

    from rotquant_tvm.frontend import ImportedModel
    from rotquant_tvm.passes.find_attention import AttentionSite

ROLES = ("query", "key", "value")
COLUMNS = (*ROLES, "attention", "output")
_PRODUCTS = ("relax.matmul", "relax.nn.attention", "relax.nn.attention_bias")
_RENAMING = ("relax.permute_dims", "relax.astype", "relax.reshape")


def site_graph(
    imported: ImportedModel, sites: list[AttentionSite], described: Sequence[dict[str, Any]] | None = None
) -> nx.DiGraph:
    """Return the graph of a model's sites; ``described`` is what is said of each, by default what it says itself.

    Nodes are (site index, column) with the data ``column``, ``row``, ``label`` and ``detail``; those of attention also
    have ``site``, what the site says of itself. Edges go from producer to user. Where one weight serves as several of
    query, key and value, one node stands for all of them.
    """
    from rotquant_tvm.passes.find_attention import dataflow_graph

    func = imported.mod["main"]
    model = _Model(func, dataflow_graph(func), imported.weight_names)
    graph = nx.DiGraph()
    for number, site in enumerate(sites):
        _add_site(graph, model, site, site.describe() if described is None else described[number])
    for earlier, later in pairwise(sites):
        if nx.has_path(model.graph, earlier.output, later.output):
            graph.add_edge((earlier.index, "output"), (later.index, "query"))
    return graph


def _add_site(graph: nx.DiGraph, model: _Model, site: AttentionSite, described: dict[str, Any]) -> None:
    index = site.index
    attention = (index, "attention")
    mask = described["mask"] + (f" {site.window}" if site.window else "")
    label = f"{index} · {site.heads}/{site.kv_heads} heads × {site.head_dim} · {mask}"
    graph.add_node(attention, column="attention", row=index, label=label, detail=_detail(described), site=described)
    producers: dict[str, list[str]] = {}
    for role, operand in zip(ROLES, site.call.args[:3], strict=True):
        producers.setdefault(model.producer(operand), []).append(role)
    for name, roles in producers.items():
        node = (index, roles[0])
        label = f"{_short(name)}" + (f" ({', '.join(roles)})" if len(roles) > 1 else "")
        graph.add_node(node, column=roles[0], row=index, label=label, detail=f"{' and '.join(roles)} of {name}")
        graph.add_edge(node, attention)
    reader = model.reader(site.output)
    graph.add_node((index, "output"), column="output", row=index, label=_short(reader), detail=f"read by {reader}")
    graph.add_edge(attention, (index, "output"))


def _detail(site: dict[str, Any]) -> str:
    past = "keys and values are cached" if site["cached"] else "no cache"
    verdict = f"{site['verdict']}: {site['reason']}" if site["reason"] else site["verdict"]
    return f"site {site['index']} ({site['variable']}), {past}, scale {site['scale']:.5g}: {verdict}"


def _short(name: str) -> str:
    """The last two words of a weight's name, without what it is of its layer: ``self_attn.q_proj``."""
    words = [word for word in name.removesuffix(".weight").split(".") if not word.isdigit()]
    return ".".join(words[-2:])


class _Model:
    """Looks for the nearest products with weights before and after a variable."""

    def __init__(self, func: relax.Function, graph: nx.DiGraph, weight_names: list[str]) -> None:
        self.graph = graph
        weights = func.params[int(func.attrs["num_input"]) :]
        self.names = dict(zip(weights, weight_names, strict=True))

    def producer(self, operand: relax.Var) -> str:
        """Name of the weight (or the operator, or the input) that a query, key or value comes from."""
        return self._nearest(operand, self.graph.predecessors) or self._nearest_other(operand)

    def reader(self, output: relax.Var) -> str:
        """Name of the weight that an attention's output is multiplied with, else of the operator that reads it."""
        return self._nearest(output, self.graph.successors, first=False) or self._reading_operator(output)

    def _nearest(self, start: relax.Var, following: Any, first: bool = True) -> str | None:
        """The first weight met, breadth first; the search stops at products."""
        queue, seen = [start] if first else list(following(start)), {start}
        while queue:
            var = queue.pop(0)
            if weight := self._weight(var):
                return weight
            if self._operator(var) not in _PRODUCTS:
                queue += [other for other in following(var) if other not in seen]
                seen.update(following(var))
        return None

    def _weight(self, var: relax.Var) -> str | None:
        """Name of the weight that a product multiplies with, through transpositions and conversions."""
        if self._operator(var) != "relax.matmul":
            return None
        for operand in self.graph.nodes[var]["value"].args:
            while self._operator(operand) in _RENAMING:
                operand = self.graph.nodes[operand]["value"].args[0]
            if operand in self.names:
                return str(self.names[operand])
        return None

    def _operator(self, var: relax.Expr) -> str:
        value = self.graph.nodes[var].get("value") if var in self.graph else None
        return str(getattr(getattr(value, "op", None), "name", ""))

    def _nearest_other(self, var: relax.Var) -> str:
        while self._operator(var) in _RENAMING:
            var = self.graph.nodes[var]["value"].args[0]
        return self._operator(var).removeprefix("relax.") or getattr(var, "name", "a constant")

    def _reading_operator(self, output: relax.Var) -> str:
        readers = [self._operator(user).removeprefix("relax.") for user in self.graph.successors(output)]
        return next(filter(None, readers), "the output")
