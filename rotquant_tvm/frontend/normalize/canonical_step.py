"""The canonical function, built from what is known of a step."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.canonical_form import INPUTS
from rotquant_tvm.frontend.normalize.batchless import Batchless, shifted
from rotquant_tvm.frontend.normalize.binding_emitter import emit_copy
from rotquant_tvm.frontend.normalize.cache_forms import Joined, SiteCache
from rotquant_tvm.frontend.normalize.cache_layouts import SiteLayouts
from rotquant_tvm.frontend.normalize.cases import StepInputs
from rotquant_tvm.frontend.normalize.input_roles import IDS
from rotquant_tvm.frontend.normalize.live_graph import LiveGraph
from rotquant_tvm.frontend.normalize.logits import OutputLayer
from rotquant_tvm.frontend.normalize.positions import Positions
from rotquant_tvm.frontend.normalize.sites import Site
from rotquant_tvm.frontend.normalize.step_view import dims, dtype_of
from rotquant_tvm.frontend.normalize.token_layout import CANONICAL, TokenLayout
from rotquant_tvm.frontend.step_graph import SOFTCAPS


@dataclass(frozen=True)
class StepFacts:
    """All that was found out about a step: per site its cache, layouts and window; positions; the output layer."""

    step: StepInputs
    sites: list[Site]
    caches: list[SiteCache]
    layouts: list[SiteLayouts]
    windows: list[int | None]
    positions: Positions
    output: OutputLayer
    live: LiveGraph
    source: str


def build_canonical_step(facts: StepFacts, every_logit: bool) -> tuple[relax.Function, list[relax.Var]]:
    """The canonical function (see ``ImportedModel``), and the source's parameters that are its weights, in order."""
    return _Builder(facts, every_logit).build()


class _Builder:
    def __init__(self, facts: StepFacts, every_logit: bool) -> None:
        self.facts, self.every_logit = facts, every_logit
        self.step, self.view, self.roles = facts.step, facts.step.view, facts.step.roles
        self.builder = relax.BlockBuilder()
        self.copies: dict[relax.Var, relax.Expr] = {}
        self.batchless = Batchless(self.step, facts.live, facts.positions, facts.source)
        self.sites = {site.output: index for index, site in enumerate(facts.sites)}
        self.presents: list[relax.Var] = []

    def build(self) -> tuple[relax.Function, list[relax.Var]]:
        """Emit everything."""
        facts, tensor = self.facts, relax.TensorType
        batch, seq = self.roles.batch, self.roles.seq
        self.ids = relax.Var("ids", tensor([batch, seq], "int32"))
        self.positions = relax.Var("positions", tensor([batch, seq], "int32"))
        self.last = relax.Var("last", tensor([batch], "int32"))
        self.pasts = [past for site in facts.sites for past in self._past_params(site)]
        inputs = set(self.step.inputs)
        sources = [param for param in facts.live.params if param not in inputs]
        weights = [relax.Var(param.name, param.ty) for param in sources]
        self.copies.update(zip(sources, weights, strict=True))
        with self.builder.function("main", [self.ids, self.positions, self.last, *self.pasts, *weights]):
            with self.builder.dataflow():
                self._bind_ids()
                for var in facts.live.order:
                    self._emit(var)
                result = self.builder.emit_output(relax.Tuple([self._logits(), *self.presents]))
            self.builder.emit_func_output(result)
        function = self.builder.finalize()["main"]
        function = function.with_attr("num_input", 3 + len(self.pasts)).with_attr("rotquant.inputs", INPUTS)
        softcaps = [site.softcap for site in facts.sites]
        return (function.with_attr(SOFTCAPS, softcaps) if any(softcaps) else function), sources

    def _past_params(self, site: Site) -> list[relax.Var]:
        params = []
        for kind, operand in zip("kv", site.call.args[1:3], strict=True):
            shape = [self.roles.batch, dims(operand)[2], self.roles.past, dims(operand)[3]]
            params.append(relax.Var(f"past_{kind}_{site.index}", relax.TensorType(shape, dtype_of(operand))))
        return params

    def _bind_ids(self) -> None:
        param = self.roles.of(IDS, self.step.inputs)[0]
        same = dtype_of(param) == "int32"
        self.copies[param] = self.ids if same else self.builder.emit(R.astype(self.ids, dtype_of(param)))

    def _emit(self, var: relax.Var) -> None:
        """Emit what is bound to a live variable, unless something else takes its place later."""
        positions = self.facts.positions
        if var in self.batchless.region or not self._wanted(var):
            return
        if var in self.sites:
            self.copies[var] = self._attention(self.sites[var])
        elif var in self.facts.live.settled:
            self.copies[var] = self._copy_of(self.facts.live.settled[var], var)
        elif var in positions.values:
            value = self.builder.emit(R.reshape(self.positions, dims(var)))
            self.copies[var] = shifted(self.builder, value, positions.values[var], dtype_of(var))
        elif var in positions.rows:
            self.copies[var] = self._table_rows(var)
        elif var in positions.tables:
            self.copies[var] = self._copy_of(self.view.values[var].args[0], var)
        else:
            self.copies[var] = emit_copy(self.builder, self.view.bindings[var], lambda used: self._copy_of(used, var))

    def _wanted(self, var: relax.Var) -> bool:
        return var in self.facts.live.readers

    def _table_rows(self, var: relax.Var) -> relax.Expr:
        """Rows of a table by position for a batch of one: [.., seq, ..] as before."""
        flat = self.builder.emit(R.reshape(self.positions, [self.roles.seq]))
        table = self._copy_of(self.view.values[var].args[0], var)
        return self.builder.emit(R.take(table, flat, axis=self.facts.positions.rows[var], mode="clip"))

    def _copy_of(self, used: relax.Var, reader: relax.Var) -> relax.Expr:
        if used in self.batchless.region:
            return self.batchless.value(self.builder, used, reader, self.copies, self.positions)
        if used not in self.copies:  # a parameter that positions replace
            value = self.builder.emit(R.reshape(self.positions, dims(used)))
            offset = self.facts.positions.values[used]
            self.copies[used] = shifted(self.builder, value, offset, dtype_of(used))
        return self.copies[used]

    def _attention(self, index: int) -> relax.Expr:
        """Attention over the past joined with the new tokens; what it joins is returned as presents."""
        facts, emit = self.facts, self.builder.emit
        site, cache, layouts = facts.sites[index], facts.caches[index], facts.layouts[index]
        operands = []
        pairs = ((cache.key, layouts.key), (cache.value, layouts.value))
        for past, (joined, layout) in zip(self.pasts[2 * index : 2 * index + 2], pairs, strict=True):
            present = emit(R.concat([past, self._new_tokens(joined, layout, site)], axis=2))
            self.presents.append(present)
            operands.append(emit(R.permute_dims(present, list(CANONICAL))))
        query = self._copy_of(site.call.args[0], site.output)
        attention = R.nn.attention(
            query, *operands, scale=site.call.attrs.scale, causal_mask="BottomRight", window_size=facts.windows[index]
        )
        return self.builder.emit(attention, site.output.name)

    def _new_tokens(self, joined: Joined, layout: TokenLayout, site: Site) -> relax.Expr:
        """The new keys or values [batch, kv_heads, seq, head_dim] in attention's dtype, rounded as the source does."""
        shape = dims(joined.operand)
        tokens = self._copy_of(joined.new, site.output)
        tokens = layout.canonical(
            self.builder, tokens, (self.roles.batch, self.roles.seq, int(shape[2]), int(shape[3]))
        )
        for dtype in (dtype_of(joined.whole), dtype_of(joined.operand)):
            if dtype_of(tokens) != dtype:
                tokens = self.builder.emit(R.astype(tokens, dtype))
        return tokens

    def _logits(self) -> relax.Expr:
        """Logits float32: [batch, vocab] of the token ``last``, or [batch, seq, vocab]."""
        output, emit = self.facts.output, self.builder.emit
        batch, seq, vocab = self.roles.batch, self.roles.seq, dims(output.logits)[-1]
        if self.every_logit:
            if output.selected is not None:
                raise ModelError(f"{self.facts.source}: it returns the logits of the last token alone")
            logits, shape = self.copies[output.logits], [batch, seq, vocab]
        else:
            logits, shape = self._last_logits(), [batch, vocab]
        if [str(size) for size in dims(logits)] != [str(size) for size in shape]:
            logits = emit(R.reshape(logits, shape))
        return logits if dtype_of(logits) == "float32" else emit(R.astype(logits, "float32"))

    def _last_logits(self) -> relax.Expr:
        """The output layer on one token of each row."""
        output, emit = self.facts.output, self.builder.emit
        batch, seq = self.roles.batch, self.roles.seq
        hidden = self.copies[output.hidden]
        width = dims(output.hidden)[-1]
        if len(dims(hidden)) == 2:
            hidden = emit(R.reshape(hidden, [batch, seq, width]))
        index = emit(R.expand_dims(emit(R.astype(self.last, "int64")), 1))  # gather_nd takes int64 only
        chosen = emit(R.gather_nd(hidden, index, batch_dims=1))
        start = output.selected if output.selected is not None else output.hidden
        shape = [batch, 1, width] if len(dims(start)) == 3 else [batch, width]
        local = {start: chosen if len(shape) == 2 else emit(R.reshape(chosen, shape))}
        for var in output.chain:
            binding = self.view.bindings[var]
            local[var] = emit_copy(
                self.builder, binding, lambda used: local[used] if used in local else self.copies[used], {seq: 1}
            )
        return local[output.logits]


def finish_module(function: relax.Function, weights: list[relax.Var]) -> tuple[tvm.IRModule, list[relax.Var]]:
    """The module of the function without what nothing reads; ``weights`` are the sources of its last parameters.

    Returns the module and the weights that are left.
    """
    mod = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    function = relax.transform.DeadCodeElimination(["main"])(mod)["main"]
    used = set(relax.analysis.free_vars(function.body))
    inputs = len(function.params) - len(weights)
    kept = [i for i, param in enumerate(function.params[inputs:]) if param in used]
    params = [*function.params[:inputs], *(function.params[inputs + i] for i in kept)]
    function = relax.Function(params, function.body, function.ret_ty, function.is_pure, function.attrs)
    return tvm.IRModule({"main": function}), [weights[i] for i in kept]
