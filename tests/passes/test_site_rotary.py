"""The rotary embedding of a site, and what is none."""

from __future__ import annotations

from rotquant_tvm.passes.feature_probe import FeatureProbe
from rotquant_tvm.passes.find_attention import find_attention
from rotquant_tvm.passes.site_rotary import site_rotary
from tvm.relax import op

from .fold_models import GPT2, INTERLEAVED, LLAMA, FoldModel


def rotaries(model: FoldModel):
    func = model.module()["main"]
    probe = FeatureProbe(func)
    return [site_rotary(probe, site) for site in find_attention(func)]


def test_of_every_site():
    for model, wanted in ((LLAMA, ("full", 32)), (INTERLEAVED, ("partial", 16)), (GPT2, ("none", 0))):
        found = rotaries(model)
        assert len(found) == 1 and (found[0].kind, found[0].dims) == wanted
    assert [r.pairs for r in rotaries(FoldModel(layers=2, rotary="interleaved"))] == ["interleaved"] * 2


class Fixed(FoldModel):
    """Mixes pairs by constants: no embedding of positions."""

    def turned(self, bb, x, positions):
        return bb.emit(op.add(x, self.half(bb, x, self.head_dim)))


def test_pairs_that_are_mixed_without_positions_are_no_embedding():
    assert rotaries(Fixed(rotary="half-split")) == [None]


class Mixed(FoldModel):
    """Keys and queries come from more than two columns each."""

    def turned(self, bb, x, positions):
        return bb.emit(op.add(x, bb.emit(op.mean(x, axis=[3], keepdims=True))))


def test_other_maps_cannot_be_told():
    assert [r and r.kind for r in rotaries(Mixed())] in ([None], ["none"])
