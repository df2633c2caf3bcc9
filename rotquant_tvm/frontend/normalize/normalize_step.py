"""The whole way from a ``StepGraph`` to an ``ImportedModel``."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.canonical_form import check_canonical
from rotquant_tvm.frontend.gather import gather_attention
from rotquant_tvm.frontend.imported_model import ImportedModel, TokenizerData
from rotquant_tvm.frontend.normalize.cache_forms import capacity_of, find_caches
from rotquant_tvm.frontend.normalize.cache_layouts import find_layouts, present_outputs
from rotquant_tvm.frontend.normalize.canonical_step import StepFacts, build_canonical_step, finish_module
from rotquant_tvm.frontend.normalize.cases import StepInputs
from rotquant_tvm.frontend.normalize.input_roles import MASK, PAST, InputRoles, find_input_roles, with_named_sizes
from rotquant_tvm.frontend.normalize.live_graph import LiveGraph
from rotquant_tvm.frontend.normalize.logits import find_logits, find_output_layer
from rotquant_tvm.frontend.normalize.masks import prove_masks
from rotquant_tvm.frontend.normalize.operator_table import Unevaluable
from rotquant_tvm.frontend.normalize.per_token import check_per_token
from rotquant_tvm.frontend.normalize.positions import find_positions
from rotquant_tvm.frontend.normalize.sites import find_sites
from rotquant_tvm.frontend.normalize.size_arithmetic import UnknownSize
from rotquant_tvm.frontend.normalize.step_view import StepView, dims
from rotquant_tvm.frontend.step_graph import StepGraph


def normalize_step(
    graph: StepGraph, *, tokenizer: TokenizerData | None = None, every_logit: bool = False
) -> ImportedModel:
    """Bring a decoder's step into the canonical form (see ``ImportedModel``).

    Whatever the source's inputs, cache layouts, masks, positions and outputs look like, the result takes ids,
    positions, last and pasts [batch, kv_heads, past, head_dim], its attention is causal by attribute, and it
    computes what the source computes for sequences without padding. A source without a cache is given one.
    ``every_logit`` as of ``import_model``. The result's ``config`` also names the outputs that were dropped
    ("dropped_outputs") and what is assumed of an input that holds the whole mask ("assumed").

    Raises ModelError for whatever cannot be shown to fit: it names the input, the attention or the operator.
    """
    roles, gathered = _prepared(graph)
    try:
        return _normalized(graph, roles, gathered, tokenizer, every_logit)
    except (UnknownSize, Unevaluable) as error:
        raise ModelError(f"{graph.source}: it cannot be analysed: {error} is not known at import") from error
    except ModelError as error:
        if PAST in roles.kinds or "simulate" in str(error):
            raise
        raise ModelError(
            f"{error}; the model has no past inputs and cannot be given a cache, but `simulate` measures its quality"
        ) from error


def _normalized(
    graph: StepGraph, roles: InputRoles, gathered: tvm.IRModule, tokenizer: TokenizerData | None, every_logit: bool
) -> ImportedModel:
    view = StepView(gathered["main"])
    params = view.function.params
    step = StepInputs(view, roles, dict(zip(params[len(graph.inputs) :], graph.weights, strict=True)))
    sites = find_sites(view, graph.source)
    caches = find_caches(step, sites, graph.source)
    capacity = capacity_of(caches)
    layouts = find_layouts(step, sites, caches, graph)
    masks = prove_masks(step, sites, graph.source, capacity)
    presents = present_outputs(step)
    logits = find_logits(step, graph, presents)
    output = find_output_layer(step, view.outputs[logits], graph.source)
    live = LiveGraph(step, sites, caches, [output.logits])
    positions = find_positions(step, live, graph.source, capacity)
    live = LiveGraph(step, sites, caches, [output.logits], positions.replaced(step), live.settled)
    check_per_token(step, live, positions, graph.source)
    facts = StepFacts(step, sites, caches, layouts, masks.windows, positions, output, live, graph.source)
    function, weights = build_canonical_step(facts, every_logit)
    mod, weights = finish_module(function, weights)
    check_canonical(mod, len(sites))
    kept = {logits} | presents
    limits = [graph.config.get("max_position"), masks.longest, positions.longest, capacity]
    config: dict[str, Any] = {
        **graph.config,
        "model_type": graph.config.get("model_type", "decoder"),
        "vocab_size": dims(output.logits)[-1],
        "max_position": min((int(limit) for limit in limits if limit is not None), default=None),
        "layers": [(site.kv_heads, site.heads, site.head_dim) for site in sites],
        "assumed": [f"the mask {param.name} is causal" for param in roles.of(MASK, step.inputs)],
        "dropped_outputs": [name for index, name in enumerate(graph.outputs) if index not in kept],
    }
    values = dict(zip(params[len(graph.inputs) :], zip(graph.weights, graph.weight_names, strict=True), strict=True))
    return ImportedModel(mod, [values[w][0] for w in weights], [values[w][1] for w in weights], config, tokenizer)


def _prepared(graph: StepGraph) -> tuple[InputRoles, tvm.IRModule]:
    """The roles of the inputs, and the module with named sizes and gathered attention."""
    function = graph.mod["main"]
    if len(function.params) != len(graph.inputs) + len(graph.weights):
        raise ModelError(
            f"{graph.source}: {len(function.params)} parameters for {len(graph.inputs)} inputs and "
            f"{len(graph.weights)} weights"
        )
    mod = relax.transform.CanonicalizeBindings()(relax.transform.Normalize()(graph.mod))
    roles = find_input_roles(graph, StepView(mod["main"]))
    return roles, gather_attention(with_named_sizes(mod, roles))
