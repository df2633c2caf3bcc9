"""Pack the weights of linear layers for CPUs, and call kernels that read them packed.

``matmul(x, permute_dims(W))`` and ``matmul(x, W)`` with a parameter ``W``, with or without a bias and a
residual added, become calls of :func:`rotquant_tvm.schedules.linear_llvm.packed_linear`; layers that read the
same x become one call. A tied embedding's ``take`` reads the same packed weight.
The parameters change: :func:`weight_recipes` tells, for each weight of the new function, how to make it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.target import Target

from ..errors import UsageError
from ..schedules.gather_llvm import PackedGather, packed_gather
from ..schedules.linear_llvm import PackedLinear, pack_weight, packed_linear
from ..schedules.vector_target import VectorTarget
from .linear_sites import EmbeddingSite, LinearSite, LinearSites

RECIPES_ATTR = "rotquant.weight_recipes"


@dataclass(frozen=True)
class WeightRecipe:
    """How to make one weight parameter of the rewritten function from those of the original one.

    ``sources`` are indices among the original function's weights (parameter ``num_input`` is weight 0);
    ``tile`` 0 means the only source unchanged, else the sources are packed and joined along the tiles;
    ``transposed`` tells which sources are stored ``[in_features, out_features]``.
    """

    name: str
    sources: tuple[int, ...]
    transposed: tuple[bool, ...]
    tile: int

    def make(self, weights: Sequence[np.ndarray]) -> np.ndarray:
        """Return the new weight, given all original ones (any sequence that yields arrays by index)."""
        if not self.tile:
            return weights[self.sources[0]]
        arrays = [
            pack_weight(weights[index].T if transposed else weights[index], self.tile)
            for index, transposed in zip(self.sources, self.transposed, strict=True)
        ]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def weight_recipes(func: relax.Function) -> tuple[WeightRecipe, ...]:
    """One recipe per weight of ``func``, in order; all "unchanged" where the pass has not run."""
    text = (func.attrs or {}).get(RECIPES_ATTR)
    if text is None:
        weights = func.params[_num_input(func) :]
        return tuple(WeightRecipe(w.name, (i,), (False,), 0) for i, w in enumerate(weights))
    records = json.loads(str(text))
    return tuple(
        WeightRecipe(r["name"], tuple(r["sources"]), tuple(r["transposed"]), r["tile"]) for r in records
    )


def make_weights(func: relax.Function, weights: Sequence[np.ndarray]) -> Iterable[np.ndarray]:
    """Yield the weights for the rewritten ``func`` in order, from all weights of the original function."""
    return (recipe.make(weights) for recipe in weight_recipes(func))


@tvm.transform.module_pass(opt_level=0, name="PackLinearWeights")
class PackLinearWeights:
    """Replace linear layers over parameters by packed kernels for a CPU target, in every Relax function.

    A function that carries recipes already is left alone, so the pass is idempotent. Weights must be 2-D,
    static, float32 or float16, and read by linear layers (and one kind of ``take``) only; others stay.
    """

    def __init__(self, target: Target, tile: int | None = None, merge: bool = True) -> None:
        """Set the llvm target and whether layers that share x become one call.

        ``tile`` (a power of two from 2 on) is how many outputs are packed together, by default two registers.
        """
        self.registers = VectorTarget.of(target)
        self.tile = self.registers.tile if tile is None else tile
        if self.tile < 2 or self.tile & (self.tile - 1):
            wanted = self.registers.tile
            raise UsageError(f"tile {tile} is not a power of two from 2 on; this target wants {wanted}")
        self.merge = merge

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite each Relax function that has linear layers over its parameters; raise if one is malformed."""
        for gvar, func in mod.functions_items():
            if not isinstance(func, relax.Function) or RECIPES_ATTR in (func.attrs or {}):
                continue
            sites = LinearSites.find(func, _num_input(func), self.merge)
            if sites.groups:
                mod = _Rewriter(mod, sites, self.registers, self.tile).rewrite(gvar, func)
        relax.analysis.well_formed(mod)
        return mod


def _num_input(func: relax.Function) -> int:
    return int((func.attrs or {}).get("num_input", 0))


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, sites: LinearSites, registers: VectorTarget, tile: int) -> None:
        super().__init__(mod)
        self.sites = sites
        self.registers = registers
        self.tile = tile
        self.groups = {site.output: group for group in sites.groups for site in group}
        self.embeddings = {site.output: site for site in sites.embeddings}
        self.packed: dict[relax.Var, relax.Var] = {}
        self.results: dict[relax.Var, relax.Expr] = {}

    def rewrite(self, gvar: tvm.ir.GlobalVar, func: relax.Function) -> tvm.IRModule:
        first = _num_input(func)
        recipes, params = [], list(func.params[:first])
        index = {weight: i for i, weight in enumerate(func.params[first:])}
        groups = {group[0].weight: group for group in self.sites.groups}
        joined = {site.weight for group in self.sites.groups for site in group[1:]}
        for weight in func.params[first:]:
            if weight in joined:
                continue
            group = groups.get(weight)
            if group is None:
                params.append(weight)
                recipes.append(WeightRecipe(weight.name, (index[weight],), (False,), 0))
                continue
            params.append(self._packed_parameter(group))
            recipes.append(
                WeightRecipe(
                    name=params[-1].name,
                    sources=tuple(index[site.weight] for site in group),
                    transposed=tuple(site.transposed for site in group),
                    tile=self.tile,
                )
            )
        body = self.visit_expr(func.body)
        text = json.dumps([asdict(recipe) for recipe in recipes])
        new = relax.Function(params, body, is_pure=func.is_pure, attrs=func.attrs)
        self.builder_.update_func(gvar, new.with_attr(RECIPES_ATTR, text))
        return self.builder_.get()

    def _packed_parameter(self, group: tuple[LinearSite, ...]) -> relax.Var:
        spec = self._spec(group)
        shape = (sum(spec.tiles), spec.in_features, self.tile)
        name = group[0].weight.name + "_packed"
        packed = relax.Var(name, relax.TensorType(shape, spec.weight_dtype))
        for site in group:
            self.packed[site.weight] = packed
        return packed

    def _spec(self, group: tuple[LinearSite, ...]) -> PackedLinear:
        one = group[0]
        return PackedLinear(
            in_features=one.in_features,
            out_features=tuple(site.out_features for site in group),
            bias=tuple(site.bias is not None for site in group),
            residual=one.residual is not None,
            leading=len(one.x.ty.shape) - 1,
            input_dtype=str(one.x.ty.dtype),
            output_dtype=str(one.output.ty.dtype),
            weight_dtype=str(one.weight.ty.dtype),
            tile=self.tile,
        )

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self.sites.absorbed:
            return
        group, embedding = self.groups.get(binding.var), self.embeddings.get(binding.var)
        if group is not None and binding.var not in self.results:
            self._call(group)
        elif embedding is not None:
            self._gather(embedding)
        if binding.var in self.results:
            self.set_var_remap(binding.var, self.results[binding.var])
        else:
            super().visit_var_binding_(binding)

    def _call(self, group: tuple[LinearSite, ...]) -> None:
        operands = [self.visit_expr(group[0].x), self.packed[group[0].weight]]
        operands += [self.visit_expr(site.bias) for site in group if site.bias is not None]
        operands += [self.visit_expr(site.residual) for site in group if site.residual is not None]
        gvar = self.builder_.add_func(packed_linear(self._spec(group), self.registers), "packed_linear")
        types = [site.output.ty for site in group]
        if len(group) == 1:
            self._emit(group[0].output, relax.call_tir(gvar, operands, types[0]))
            return
        outputs = self.builder_.emit(relax.call_tir(gvar, operands, types))
        for i, site in enumerate(group):
            self._emit(site.output, relax.TupleGetItem(outputs, i))

    def _gather(self, site: EmbeddingSite) -> None:
        vocabulary, features = (int(n) for n in site.weight.ty.shape)
        spec = PackedGather(
            vocabulary,
            features,
            leading=len(site.ids.ty.shape),
            index_dtype=str(site.ids.ty.dtype),
            weight_dtype=str(site.weight.ty.dtype),
            output_dtype=str(site.output.ty.dtype),
            tile=self.tile,
        )
        gvar = self.builder_.add_func(packed_gather(spec), "packed_gather")
        operands = [self.packed[site.weight], self.visit_expr(site.ids)]
        self._emit(site.output, relax.call_tir(gvar, operands, site.output.ty))

    def _emit(self, output: relax.Var, value: relax.Expr) -> None:
        leaves = self.builder_.current_block_is_dataflow() and not isinstance(output, relax.DataflowVar)
        self.results[output] = (self.builder_.emit_output if leaves else self.builder_.emit)(value)
