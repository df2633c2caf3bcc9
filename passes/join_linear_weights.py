"""Linear layers on CUDA: kernels that read the weights as they are stored, ``[out_features, in_features]``.

``matmul(x, permute_dims(W))`` with a float16 parameter ``W``, with or without a bias and a residual added, becomes a
call of :func:`rotquant_tvm.schedules.linear_cuda.cuda_linear`; layers that read the same x become one call, their
weights one parameter, and ``silu(x Gᵀ) · (x Uᵀ)`` one result. The parameters change as their recipes
(``weight_recipes``) tell.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import tvm
from tvm import relax
from tvm.target import Target

from ..schedules.linear_cuda import SLICE, CUDALinear, cuda_linear
from ..schedules.linear_rule_cuda import linear_shape
from .linear_rewriter import Group, LinearRewriter
from .linear_sites import LinearSite, LinearSites
from .weight_recipes import RECIPES_ATTR, num_input


@tvm.transform.module_pass(opt_level=0, name="JoinLinearWeights")
class JoinLinearWeights:
    """Replace linear layers over float16 parameters by CUDA kernels, in every Relax function.

    A function that carries recipes already is left alone, so the pass is idempotent. Layers of other types, or with a
    number of input features that is no multiple of 64, stay.
    """

    def __init__(self, target: Target) -> None:
        """Set the CUDA target."""
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite each Relax function that has linear layers over its parameters; raise if one is malformed."""
        for gvar, func in mod.functions_items():
            if not isinstance(func, relax.Function) or RECIPES_ATTR in (func.attrs or {}):
                continue
            found = LinearSites.find(func, num_input(func), merge=True, accept=_accepted)
            products = _Products(func)
            groups = tuple(products.ordered(group) for group in _agreeing(found))
            if groups:
                absorbed = products.absorbed | {var for group in groups for site in group for var in site.absorbed}
                sites = replace(found, groups=groups, embeddings=(), absorbed=frozenset(absorbed))
                mod = _Rewriter(mod, sites, self.target, products.gated).rewrite(gvar, func)
        mod = relax.transform.DeadCodeElimination()(mod)
        relax.analysis.well_formed(mod)
        return mod


def _accepted(site: LinearSite) -> bool:
    dtypes = {str(var.ty.dtype) for var in (site.x, site.weight, site.output)}
    return dtypes == {"float16"} and site.in_features % SLICE == 0


def _agreeing(sites: LinearSites) -> tuple[Group, ...]:
    """The groups but those with a weight that some readers take as it is and others transposed."""
    readings: dict[relax.Var, set[bool]] = defaultdict(set)
    for site in (site for group in sites.groups for site in group):
        readings[site.weight].add(site.transposed)
    for embedding in sites.embeddings:
        readings[embedding.weight].add(False)
    return tuple(g for g in sites.groups if all(len(readings[site.weight]) == 1 for site in g))


class _Products:
    """Groups of two layers of which nothing becomes but silu(first) · second.

    ``gated``: the product's variable, by the group as ``ordered`` returned it; ``absorbed``: what stands between.
    """

    def __init__(self, func: relax.Function) -> None:
        self.gated: dict[Group, relax.Var] = {}
        self.absorbed: set[relax.Var] = set()
        self._users: dict[relax.Var, list[relax.VarBinding]] = defaultdict(list)
        for block in func.body.blocks:
            for binding in block.bindings:
                relax.analysis.post_order_visit(
                    binding.value, lambda e, b=binding: self._users[e].append(b) if isinstance(e, relax.Var) else None
                )

    def ordered(self, group: Group) -> Group:
        """The group with its gate first, if it has one."""
        same = len(group) == 2 and group[0].out_features == group[1].out_features
        if not same or any(site.bias is not None for site in group):
            return group
        for candidate in (group, group[::-1]):
            product = self._product(*(site.output for site in candidate))
            if product is not None:
                self.gated[candidate] = product
                return candidate
        return group

    def _product(self, gate: relax.Var, other: relax.Var) -> relax.Var | None:
        activation, product = self._reader(gate), self._reader(other)
        if activation is None or product is None or not _calls(activation, "relax.nn.silu"):
            return None
        if not product.same_as(self._reader(activation.var)) or not _calls(product, "relax.multiply"):
            return None
        self.absorbed.update((gate, other, activation.var))
        return product.var

    def _reader(self, var: relax.Var) -> relax.VarBinding | None:
        """The one binding that reads a variable of the dataflow."""
        users = self._users[var]
        return users[0] if len(users) == 1 and isinstance(var, relax.DataflowVar) else None


def _calls(binding: relax.VarBinding, name: str) -> bool:
    return isinstance(binding.value, relax.Call) and getattr(binding.value.op, "name", "") == name


@relax.expr_functor.mutator
class _Rewriter(LinearRewriter):
    def __init__(
        self, mod: tvm.IRModule, sites: LinearSites, target: Target, gated: dict[Group, relax.Var]
    ) -> None:
        super().__init__(mod, sites)
        self.target, self.gated = target, gated

    def weight_shape(self, group: Group) -> tuple[int, ...]:
        """One layer after the other."""
        return sum(site.out_features for site in group), group[0].in_features

    def weight_name(self, group: Group) -> str:
        """The layers' names, or the layer's own where its weight only changes its order."""
        return "_and_".join(str(site.weight.name) for site in group)

    def emit_group(self, group: Group) -> None:
        """The kernel over all layers of the group."""
        product, one = self.gated.get(group), group[0]
        spec = CUDALinear(
            in_features=one.in_features,
            out_features=tuple(site.out_features for site in group),
            bias=tuple(site.bias is not None for site in group),
            residual=one.residual is not None,
            gated=product is not None,
            leading=len(one.x.ty.shape) - 1,
            output_dtype=str(one.output.ty.dtype),
        )
        outputs = [site.output for site in group] if product is None else [product]

        def make() -> tvm.tirx.PrimFunc:
            return cuda_linear(spec, self.target).with_attrs(linear_shape(spec).attrs())

        self.call(self.kernel(spec, make, "linear"), self.operands(group), outputs)
