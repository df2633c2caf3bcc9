"""The shell of passes that put kernels of their own in the place of linear layers, and change the layers' weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import tvm
from tvm import relax

from .linear_sites import EmbeddingSite, LinearSite, LinearSites
from .weight_recipes import WeightRecipe, num_input, with_recipes

Group = tuple[LinearSite, ...]


class LinearRewriter(relax.PyExprMutator):
    """Base of mutators over one function; subclasses are decorated with ``relax.expr_functor.mutator``.

    The layers of a group are one call that reads one weight parameter: they say which (``weight_shape``) and which
    kernel it is (``emit_group``).
    """

    def __init__(self, mod: tvm.IRModule, sites: LinearSites) -> None:
        super().__init__(mod)
        self.sites = sites
        self.groups = {site.output: group for group in sites.groups for site in group}
        self.embeddings = {site.output: site for site in sites.embeddings}
        self.joined: dict[relax.Var, relax.Var] = {}
        """The new parameter that holds an old one's weights."""
        self.results: dict[relax.Var, relax.Expr] = {}
        self._emitted: set[Group] = set()
        self._kernels: dict[Hashable, tvm.ir.GlobalVar] = {}

    tile = 0
    """Of the recipes."""

    def weight_shape(self, group: Group) -> tuple[int, ...]:
        """Shape of the group's weight."""
        raise NotImplementedError

    def weight_name(self, group: Group) -> str:
        """Name of the group's weight."""
        return str(group[0].weight.name) + "_packed"

    def emit_group(self, group: Group) -> None:
        """Emit the group's call; see ``call``."""
        raise NotImplementedError

    def emit_embedding(self, site: EmbeddingSite) -> None:
        """Emit the lookup of a weight that linear layers read too, if it must change."""

    def rewrite(self, gvar: tvm.ir.GlobalVar, func: relax.Function) -> tvm.IRModule:
        """Return the module with ``func`` (under ``gvar``) rewritten."""
        first = num_input(func)
        recipes, params = [], list(func.params[:first])
        index = {weight: i for i, weight in enumerate(func.params[first:])}
        groups = {group[0].weight: group for group in self.sites.groups}
        joined = {site.weight for group in self.sites.groups for site in group[1:]}
        for weight in func.params[first:]:
            if weight in joined:
                continue
            group = groups.get(weight)
            recipe = WeightRecipe(weight.name, (index[weight],), (False,), 0)
            if group is not None:
                sources = tuple(index[site.weight] for site in group)
                flags = tuple(site.transposed for site in group)
                recipe = WeightRecipe(self.weight_name(group), sources, flags, self.tile)
            params.append(weight if recipe.unchanged else self._parameter(recipe.name, group))
            for site in group or ():
                self.joined[site.weight] = params[-1]
            recipes.append(WeightRecipe(params[-1].name, *_rest(recipe)))
        body = self.visit_expr(func.body)
        new = relax.Function(params, body, is_pure=func.is_pure, attrs=func.attrs)
        self.builder_.update_func(gvar, with_recipes(new, recipes))
        return self.builder_.get()

    def _parameter(self, name: str, group: Group) -> relax.Var:
        return relax.Var(name, relax.TensorType(self.weight_shape(group), str(group[0].weight.ty.dtype)))

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Emit a group at the first of its outputs, in the place of its layers."""
        group, embedding = self.groups.get(binding.var), self.embeddings.get(binding.var)
        if group is not None and group not in self._emitted:
            self._emitted.add(group)
            self.emit_group(group)
        elif embedding is not None:
            self.emit_embedding(embedding)
        if binding.var in self.results:
            self.set_var_remap(binding.var, self.results[binding.var])
        elif binding.var not in self.sites.absorbed:
            super().visit_var_binding_(binding)

    def operands(self, group: Group) -> list[relax.Expr]:
        """x, the weight, the layers' biases and their residual."""
        operands = [self.visit_expr(group[0].x), self.joined[group[0].weight]]
        operands += [self.visit_expr(site.bias) for site in group if site.bias is not None]
        return operands + [self.visit_expr(site.residual) for site in group if site.residual is not None]

    def kernel(self, spec: Hashable, make: Callable[[], tvm.tirx.PrimFunc], name: str) -> tvm.ir.GlobalVar:
        """The kernel of a ``spec``, made once: to compare it with all others takes long, layer by layer."""
        if spec not in self._kernels:
            self._kernels[spec] = self.builder_.add_func(make(), name)
        return self._kernels[spec]

    def call(self, gvar: tvm.ir.GlobalVar, operands: Iterable[relax.Expr], outputs: list[relax.Var]) -> None:
        """Call a kernel whose results take the place of ``outputs``."""
        types = [output.ty for output in outputs]
        if len(outputs) == 1:
            self._emit(outputs[0], relax.call_tir(gvar, list(operands), types[0]))
            return
        results = self.builder_.emit(relax.call_tir(gvar, list(operands), types))
        for i, output in enumerate(outputs):
            self._emit(output, relax.TupleGetItem(results, i))

    def _emit(self, output: relax.Var, value: relax.Expr) -> None:
        leaves = self.builder_.current_block_is_dataflow() and not isinstance(output, relax.DataflowVar)
        self.results[output] = (self.builder_.emit_output if leaves else self.builder_.emit)(value)


def _rest(recipe: WeightRecipe) -> tuple[tuple[int, ...], tuple[bool, ...], int]:
    return recipe.sources, recipe.transposed, recipe.tile
