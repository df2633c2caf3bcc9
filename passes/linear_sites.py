"""Find the linear layers of a Relax function whose weight is a parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import tvm
import tvm_ffi
from tvm import relax

_WEIGHT_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, eq=False)
class LinearSite:
    """One linear layer: ``output = x Wᵀ (+ bias) (+ residual)``.

    ``transposed`` tells that ``weight`` is stored ``[in_features, out_features]``; ``absorbed`` are the
    variables in between, which nothing else reads; ``block`` numbers the binding block.
    """

    output: relax.Var
    x: relax.Var
    weight: relax.Var
    transposed: bool
    block: int
    bias: relax.Var | None = None
    residual: relax.Var | None = None
    absorbed: tuple[relax.Var, ...] = ()

    @property
    def in_features(self) -> int:
        """Columns of x."""
        return int(self.weight.ty.shape[0 if self.transposed else 1])

    @property
    def out_features(self) -> int:
        """Columns of the output."""
        return int(self.weight.ty.shape[1 if self.transposed else 0])


@dataclass(frozen=True, eq=False)
class EmbeddingSite:
    """``output = take(weight, ids)`` along the vocabulary of a weight that a linear layer reads too."""

    output: relax.Var
    weight: relax.Var
    ids: relax.Expr


@dataclass(frozen=True)
class LinearSites:
    """All sites of a function; the sites of a group read the same x and become one launch."""

    groups: tuple[tuple[LinearSite, ...], ...]
    embeddings: tuple[EmbeddingSite, ...]
    absorbed: frozenset[relax.Var]

    @classmethod
    def find(
        cls, func: relax.Function, num_input: int, merge: bool, accept: Callable[[LinearSite], bool] | None = None
    ) -> LinearSites:
        """Find the sites over parameters from ``num_input`` on; with ``merge``, group those that share x.

        A weight with a site that ``accept`` declines is left alone.
        """
        finder = _Finder(func, num_input, accept)
        groups: dict[object, list[LinearSite]] = defaultdict(list)
        for i, site in enumerate(finder.linear):
            alone = not merge or site.residual is not None or finder.readers[site.weight] > 1
            same = (site.x, site.block, str(site.output.ty.dtype), str(site.weight.ty.dtype))
            groups[i if alone else same].append(site)
        return cls(
            groups=tuple(tuple(group) for group in groups.values()),
            embeddings=tuple(finder.embeddings),
            absorbed=frozenset(finder.aliases) | {v for site in finder.linear for v in site.absorbed},
        )


class _Finder:
    """One walk over the bindings; a weight with any reader that is no site is dropped in the end.

    ``aliases`` maps each variable that only renames a weight (transposed, converted) to
    (weight, whether ``[in, out]`` order is needed), ``readers`` counts the sites of each weight; ``sums`` are
    the adds that sites have taken: where two sites meet in one add, only the first takes the other as residual.
    """

    def __init__(
        self, func: relax.Function, num_input: int, accept: Callable[[LinearSite], bool] | None = None
    ) -> None:
        self.accept = accept
        self.linear: list[LinearSite] = []
        self.embeddings: list[EmbeddingSite] = []
        self.aliases: dict[relax.Var, tuple[relax.Var, bool]] = {}
        self.params = set(func.params)
        self.weights = {param for param in func.params[num_input:] if _packable(param)}
        self.refused: set[relax.Var] = set()
        self.sums: set[relax.Var] = set()
        self.users: dict[relax.Var, list[relax.Binding | None]] = defaultdict(list)
        blocks = func.body.blocks
        for block in blocks:
            for binding in block.bindings:
                for var in _variables(binding.value if hasattr(binding, "value") else binding.input):
                    self.users[var].append(binding)
        for var in _variables(func.body.body):
            self.users[var].append(None)
        for number, block in enumerate(blocks):
            for binding in block.bindings:
                self._visit(binding, number)
        self._refuse(_variables(func.body.body))
        self._finish()

    def _visit(self, binding: relax.Binding, block: int) -> None:
        value = binding.value if isinstance(binding, relax.VarBinding) else binding.input
        name = value.op.name if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) else ""
        source = self._source(value.args[0]) if name and value.args else None
        if name in ("relax.permute_dims", "relax.astype") and source and self._alias(binding, name, source):
            return
        if name == "relax.take" and source and not source[1] and self._take(binding, source[0]):
            return
        if name == "relax.matmul" and not source and self._matmul(binding, block):
            return
        self._refuse(_variables(value))

    def _source(self, var: relax.Expr) -> tuple[relax.Var, bool] | None:
        if var in self.weights:
            return var, False
        return self.aliases.get(var)

    def _refuse(self, variables: set[relax.Var]) -> None:
        self.refused.update(source[0] for var in variables if (source := self._source(var)))

    def _alias(self, binding: relax.VarBinding, name: str, source: tuple[relax.Var, bool]) -> bool:
        weight, flipped = source
        if not isinstance(binding.var, relax.DataflowVar) and None in self.users[binding.var]:
            return False
        if name == "relax.permute_dims":
            axes = binding.value.attrs.axes
            flipped ^= axes is None or [int(axis) for axis in axes] == [1, 0]
        elif str(binding.var.ty.dtype) != "float32":
            return False
        self.aliases[binding.var] = (weight, flipped)
        return True

    def _take(self, binding: relax.VarBinding, weight: relax.Var) -> bool:
        attrs, ids = binding.value.attrs, binding.value.args[1]
        integers = _is_tensor(ids) and str(ids.ty.dtype) in ("int32", "int64")
        if attrs.axis is None or int(attrs.axis) != 0 or attrs.mode not in ("fast", "clip") or not integers:
            return False
        self.embeddings.append(EmbeddingSite(binding.var, weight, ids))
        return True

    def _matmul(self, binding: relax.VarBinding, block: int) -> bool:
        x, source = binding.value.args[0], self._source(binding.value.args[1])
        if not source or not isinstance(x, relax.Var) or not _is_tensor(x) or len(x.ty.shape) < 2:
            return False
        dtypes = {str(x.ty.dtype), str(binding.var.ty.dtype)}
        if not dtypes <= set(_WEIGHT_DTYPES):
            return False
        site = LinearSite(binding.var, x, source[0], transposed=not source[1], block=block)
        if self.accept is not None and not self.accept(site):
            return False
        self.linear.append(self._with_residual(self._with_bias(site)))
        return True

    def _with_bias(self, site: LinearSite) -> LinearSite:
        found = self._added(site)
        if found is None:
            return site
        output, bias = found
        is_bias = bias in self.params and _static_shape(bias) == [site.out_features]
        return replace(site, output=output, bias=bias, absorbed=(site.output,)) if is_bias else site

    def _with_residual(self, site: LinearSite) -> LinearSite:
        found = self._added(site)
        if found is None or not tvm_ffi.structural_equal(found[1].ty.shape, site.output.ty.shape):
            return site
        output, residual = found
        if output in self.sums:
            return site
        self.sums.add(output)
        return replace(site, output=output, residual=residual, absorbed=(*site.absorbed, site.output))

    def _added(self, site: LinearSite) -> tuple[relax.Var, relax.Var] | None:
        """(sum, other operand) where the site's output has one reader, an ``add`` of the same dtype."""
        users = self.users[site.output]
        if len(users) != 1 or not isinstance(site.output, relax.DataflowVar):
            return None
        call = getattr(users[0], "value", None)
        if not isinstance(call, relax.Call) or call.op != tvm.ir.Op.get("relax.add"):
            return None
        others = [arg for arg in call.args if not site.output.same_as(arg)]
        if len(others) != 1 or not isinstance(others[0], relax.Var) or not _is_tensor(others[0]):
            return None
        same = str(others[0].ty.dtype) == str(site.output.ty.dtype)
        return (users[0].var, others[0]) if same else None

    def _finish(self) -> None:
        wanted = {site.weight for site in self.linear} - self.refused
        self.linear = [site for site in self.linear if site.weight in wanted]
        self.embeddings = [site for site in self.embeddings if site.weight in wanted]
        self.aliases = {var: source for var, source in self.aliases.items() if source[0] in wanted}
        self.readers: dict[relax.Var, int] = defaultdict(int)
        for site in (*self.linear, *self.embeddings):
            self.readers[site.weight] += 1


def _is_tensor(expr: relax.Expr) -> bool:
    return isinstance(expr.ty, relax.TensorType) and isinstance(expr.ty.shape, relax.ShapeExpr)


def _packable(param: relax.Var) -> bool:
    return _is_tensor(param) and str(param.ty.dtype) in _WEIGHT_DTYPES and len(_static_shape(param)) == 2


def _static_shape(var: relax.Var) -> list[int]:
    """Extents, or an empty list where one is symbolic."""
    shape = list(var.ty.shape)
    return [int(n) for n in shape] if all(isinstance(n, tvm.tirx.IntImm) for n in shape) else []


def _variables(expr: relax.Expr) -> set[relax.Var]:
    found: set[relax.Var] = set()
    relax.analysis.post_order_visit(expr, lambda e: found.add(e) if isinstance(e, relax.Var) else None)
    return found
