"""The attentions of a step, as the normalizer speaks of them."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize.step_view import StepView, dims
from rotquant_tvm.frontend.step_graph import SOFTCAPS

ATTENTION = {"nn.attention", "nn.attention_bias"}


@dataclass(frozen=True)
class Site:
    """One attention: ``output`` is bound to ``call``; ``mask`` is its additive mask or None; ``softcap`` 0 for none."""

    index: int
    output: relax.Var
    call: relax.Call
    softcap: float

    @property
    def mask(self) -> relax.Expr | None:
        """The additive mask, or None."""
        return self.call.args[3] if len(self.call.args) > 3 else None

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(dims(self.call.args[0])[2])

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return int(dims(self.call.args[1])[2])

    @property
    def head_dim(self) -> int:
        """Dimensions of a query head."""
        return int(dims(self.call.args[0])[3])

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"attention {self.index} ({self.output.name})"


def find_sites(view: StepView, source: str) -> list[Site]:
    """The attentions that the step's outputs are computed from, in order. Raises ModelError without any."""
    calls = [var for var in view.values if view.op(var) in ATTENTION]
    softcaps = list((view.function.attrs or {}).get(SOFTCAPS, [0.0] * len(calls)))
    if len(softcaps) != len(calls):
        raise ModelError(f"{source}: {SOFTCAPS} lists {len(softcaps)} attentions of {len(calls)}")
    live = set(view.slice(view.outputs))
    found = [(var, cap) for var, cap in zip(calls, softcaps, strict=True) if var in live]
    if not found:
        raise ModelError(
            f"{source}: no attention was found, so there is no KV cache to quantize; if it has one, `tvmc inspect` "
            "tells where its operators differ from attention"
        )
    sites = [Site(i, var, view.values[var], float(cap)) for i, (var, cap) in enumerate(found)]
    for site in sites:
        for operand, role in zip(site.call.args[:3], ("queries", "keys", "values"), strict=True):
            shape = dims(operand)
            if shape is None or not all(isinstance(size, int) for size in shape[2:]):
                raise ModelError(f"{source}: {site.name}: the heads and head dimension of its {role} are not fixed")
    return sites


def attribute(call: relax.Call, name: str) -> int | None:
    """An attribute of an attention that is a whole number or absent."""
    value = getattr(call.attrs, name)
    return int(value) if value is not None else None
