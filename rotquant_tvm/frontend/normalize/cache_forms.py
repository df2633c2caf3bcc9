"""Where each attention's keys and values come from: a past joined with, or written over by, new tokens."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize.cases import StepInputs
from rotquant_tvm.frontend.normalize.input_roles import IDS, PAST
from rotquant_tvm.frontend.normalize.movement import MOVES, PACKS, WRITES, moved_from, origin
from rotquant_tvm.frontend.normalize.sites import ATTENTION, Site
from rotquant_tvm.frontend.normalize.step_view import StepView, dims, op_name, value_operands


@dataclass(frozen=True)
class Joined:
    """The keys (or values) of one site: ``operand`` of attention moves the elements of ``whole``.

    ``whole`` is ``past`` (an input, moved or not) with ``new`` tokens; without a cache ``past`` is None and all three
    of the others are the operand. ``written``: the past is a buffer of fixed length that new tokens are written into.
    """

    operand: relax.Var
    whole: relax.Var
    new: relax.Var
    past: relax.Var | None
    written: bool


@dataclass(frozen=True)
class SiteCache:
    """The keys and values of one site."""

    key: Joined
    value: Joined


def find_caches(step: StepInputs, sites: list[Site], source: str) -> list[SiteCache]:
    """The keys and values of every site.

    Raises ModelError for cross-attention, for keys that are computed from a cache by more than moving it (latent
    caches, keys rotated after the cache), for layers that share one and for a model whose layers are not all cached.
    """
    cached = PAST in step.roles.kinds
    caches = [SiteCache(*(_joined(step, site, role, cached, source) for role in ("key", "value"))) for site in sites]
    _refuse_shared(sites, caches, source)
    if cached:
        _refuse_other_readers(step, sites, caches, source)
    return caches


def _joined(step: StepInputs, site: Site, role: str, cached: bool, source: str) -> Joined:
    operand = site.call.args[1 if role == "key" else 2]
    where = f"{source}: the {role}s of {site.name}"
    if not isinstance(operand, relax.Var):
        raise ModelError(f"{where} are a constant")
    pasts = set(step.roles.of(PAST, step.inputs))
    var: relax.Var = operand
    while True:
        joined = _join(step.view, operand, var, pasts)
        if joined is not None:
            return joined
        before = moved_from(step.view, var)
        if before is None:
            break
        var = before
    read = step.view.slice([operand])
    if not any(used in pasts for used in read):
        if not set(step.roles.of(IDS, step.inputs)).intersection(read):
            raise ModelError(f"{where} are not computed from the token ids: cross-attention is not supported")
        if cached:
            raise ModelError(f"{where} have no past among the inputs, and other layers' have; it is not supported")
        return Joined(operand, operand, operand, None, False)
    if var in pasts:
        raise ModelError(f"{where} are the input {var.name} as it is: cross-attention is not supported")
    if var in step.view.values and step.view.op(var) not in ATTENTION:
        read = [v for v in step.view.slice([var], stop=lambda v: step.view.op(v) in ATTENTION) if v in pasts]
        if not read:
            raise ModelError(f"{where} have no past of their own; layers that share keys are not supported")
    hint = {
        "matmul": " (a latent cache, as of multi-head latent attention, is not supported)",
        "add": " (keys that are rotated after the cache are not supported)",
        "multiply": " (scaled caches are not supported)",
    }.get(step.view.op(var), "")
    raise ModelError(f"{where} are computed from the past by {_operation(step.view, var)} ({var.name}){hint}")


def _join(view: StepView, operand: relax.Var, var: relax.Var, pasts: set[relax.Var]) -> Joined | None:
    """Read ``var`` as a past joined with new tokens; None if it is bound to anything else."""
    value = view.value(var)
    name = op_name(value)
    if name in PACKS and isinstance(value.args[0], relax.Tuple):
        parts = list(value.args[0].fields)
        origins = [origin(view, part) for part in parts]
        old = [i for i, source in enumerate(origins) if source in pasts]
        if len(parts) == 2 and len(old) == 1:
            new = parts[1 - old[0]]
            return Joined(operand, var, new, origins[old[0]], False) if isinstance(new, relax.Var) else None
    elif name in WRITES:
        past, new = origin(view, value.args[0]), value.args[2]
        if past in pasts and isinstance(new, relax.Var):
            return Joined(operand, var, new, past, True)
    return None


def _operation(view: StepView, var: relax.Var) -> str:
    return f"relax.{view.op(var)}" if view.op(var) else type(view.value(var)).__name__


def _refuse_shared(sites: list[Site], caches: list[SiteCache], source: str) -> None:
    """Refuse keys that are read twice: by two layers, or as values too."""
    owners: dict[relax.Var, tuple[Site, str]] = {}
    for site, cache in zip(sites, caches, strict=True):
        for joined, role in ((cache.key, "keys"), (cache.value, "values")):
            # One join may hold a layer's keys and values packed; then they are different parts of it.
            if joined.operand in owners or (joined.whole in owners and owners[joined.whole][0] is not site):
                other, other_role = owners.get(joined.operand) or owners[joined.whole]
                raise ModelError(
                    f"{source}: the {role} of {site.name} are the {other_role} of {other.name}; shared ones are not "
                    "supported"
                )
            owners[joined.operand] = owners[joined.whole] = (site, role)


def _refuse_other_readers(step: StepInputs, sites: list[Site], caches: list[SiteCache], source: str) -> None:
    """Refuse a past, or a present, that is read by anything but its attention and the outputs."""
    view = step.view
    reads = {site.output for site in sites}
    tainted = set(step.roles.of(PAST, step.inputs))
    layers = {}
    for site, cache in zip(sites, caches, strict=True):
        for joined in (cache.key, cache.value):
            layers[joined.past] = site
    for var, value in view.values.items():
        found = [used for used in value_operands(value) if used in tainted]
        if var in reads and any(value.args[0].same_as(used) for used in found):
            raise ModelError(f"{source}: the queries of attention {var.name} are a past; it is not supported")
        if not found or var in reads or isinstance(value, relax.Tuple):
            continue
        if isinstance(value, (relax.Var, relax.TupleGetItem)) or op_name(value) in MOVES | PACKS | WRITES:
            tainted.add(var)
        elif _is_live(step, var):
            owner = next((layers[past] for past in view.slice([var]) if past in layers), None)
            where = f" of {owner.name}" if owner is not None else ""
            raise ModelError(
                f"{source}: the cache{where} is read outside its attention too, by {_operation(view, var)} ({var.name})"
            )


def _is_live(step: StepInputs, var: relax.Var) -> bool:
    """Whether an output is computed from a variable."""
    return any(isinstance(out, relax.Var) and out in step.view.reached([var]) for out in step.view.outputs) or any(
        var in value_operands(out) for out in step.view.outputs if not isinstance(out, relax.Var)
    )


def capacity_of(caches: list[SiteCache]) -> int | None:
    """The length of the buffers that new tokens are written into; None for caches that grow."""
    lengths = [dims(joined.operand)[1] for cache in caches for joined in (cache.key, cache.value) if joined.written]
    fixed = [length for length in lengths if isinstance(length, int)]
    return min(fixed, default=None)
