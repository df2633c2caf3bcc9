"""Pack the weights of linear layers for CPUs, and call kernels that read them packed.

``matmul(x, permute_dims(W))`` and ``matmul(x, W)`` with a parameter ``W``, with or without a bias and a
residual added, become calls of :func:`rotquant_tvm.schedules.linear_llvm.packed_linear`; layers that read the
same x become one call. A tied embedding's ``take`` reads the same packed weight.
The parameters change: ``weight_recipes`` tells, for each weight of the new function, how to make it.
"""

from __future__ import annotations

from functools import partial

import tvm
from tvm import relax
from tvm.target import Target

from ..errors import UsageError
from ..schedules.gather_llvm import PackedGather, packed_gather
from ..schedules.linear_llvm import PackedLinear, packed_linear
from ..schedules.linear_rule_llvm import linear_shape
from ..schedules.vector_target import VectorTarget
from .linear_rewriter import Group, LinearRewriter
from .linear_sites import EmbeddingSite, LinearSites
from .weight_recipes import RECIPES_ATTR, num_input


@tvm.transform.module_pass(opt_level=0, name="PackLinearWeights")
class PackLinearWeights:
    """Replace linear layers over parameters by packed kernels for a CPU target, in every Relax function.

    A function that carries recipes already is left alone, so the pass is idempotent. Weights must be 2-D,
    static, in float32 or 16 bits, and read by linear layers (and one kind of ``take``) only; others stay.
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
            sites = LinearSites.find(func, num_input(func), self.merge)
            if sites.groups:
                mod = _Rewriter(mod, sites, self.registers, self.tile).rewrite(gvar, func)
        relax.analysis.well_formed(mod)
        return mod


@relax.expr_functor.mutator
class _Rewriter(LinearRewriter):
    def __init__(self, mod: tvm.IRModule, sites: LinearSites, registers: VectorTarget, tile: int) -> None:
        super().__init__(mod, sites)
        self.registers = registers
        self.tile = tile

    def weight_shape(self, group: Group) -> tuple[int, ...]:
        """Tiles of all layers."""
        spec = self._spec(group)
        return sum(spec.tiles), spec.in_features, self.tile

    def _spec(self, group: Group) -> PackedLinear:
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

    def emit_group(self, group: Group) -> None:
        """The vector kernel over packed weights."""
        spec = self._spec(group)

        def make() -> tvm.tirx.PrimFunc:
            return packed_linear(spec, self.registers).with_attrs(linear_shape(spec).attrs())

        self.call(self.kernel(spec, make, "packed_linear"), self.operands(group), [site.output for site in group])

    def emit_embedding(self, site: EmbeddingSite) -> None:
        """A lookup in the packed weight."""
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
        operands = [self.joined[site.weight], self.visit_expr(site.ids)]
        gather = self.kernel(spec, partial(packed_gather, spec), "packed_gather")
        self.call(gather, operands, [site.output])
