"""HeadSource: which columns heads are made of, which pairs are turned, and which maps pass."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.passes.feature_probe import FeatureProbe
from rotquant_tvm.passes.find_attention import find_attention
from rotquant_tvm.passes.head_sources import HEADS_AXIS, HeadSource, escaping
from tvm.relax import op

from rotquant_tvm.formats import Rotation

from .fold_models import FoldModel
from .tiny_model import TinyModel


def source(model: TinyModel, role: str = "k") -> HeadSource:
    """Of the first layer's query, key or value."""
    func = model.module()["main"]
    site = find_attention(func)[0]
    end = {"q": site.call.args[0], "k": site.key.new, "v": site.value.new}[role]
    return HeadSource.of(FeatureProbe(func), end, HEADS_AXIS[role])


@pytest.mark.parametrize("role", ["q", "k", "v"])
@pytest.mark.parametrize("packed", [False, True])
def test_columns_in_order(role, packed):
    model = FoldModel(packed=packed, rotary="half-split")
    found = source(model, role)
    q, kv = model.widths
    first = {"q": 0, "k": q, "v": q + kv}[role] if packed else 0
    heads = model.heads if role == "q" else model.kv_heads
    assert found.starts == tuple(range(first, first + heads * 32, 32)) and found.in_order
    assert found.rotary.dims == (0 if role == "v" else 32)
    assert found.probe.operator(found.source) == ("add" if packed else "matmul")


class Reversed(FoldModel):
    """Its heads hold their columns the other way round."""

    def turned(self, bb, x, positions):
        import tvm.relax as relax

        order = relax.const(np.arange(self.head_dim)[::-1].astype("int64"))
        return bb.emit(op.take(x, order, axis=3))


def test_columns_out_of_order_are_told():
    found = source(Reversed(), "k")
    assert found.starts == (0, 32) and not found.in_order
    assert not found.equivariant(Rotation.draw("dense", 32, 1).matrix())


@pytest.mark.parametrize(
    ("model", "dims", "kind", "pairs"),
    [
        (FoldModel(), 0, "none", "none"),
        (FoldModel(rotary="half-split"), 32, "full", "half-split"),
        (FoldModel(rotary="half-split", rotary_dims=8), 8, "partial", "half-split"),
        (FoldModel(rotary="interleaved"), 32, "full", "interleaved"),
        (FoldModel(rotary="interleaved", rotary_dims=16), 16, "partial", "interleaved"),
        (FoldModel(rotary="half-split", norm=True), 32, "full", "half-split"),
        (FoldModel(rotary="interleaved", packed=True), 32, "full", "interleaved"),
    ],
)
def test_rotary_embeddings(model, dims, kind, pairs):
    for role in "qk":
        rotary = source(model, role).rotary
        assert (rotary.dims, rotary.kind, rotary.pairs) == (dims, kind, pairs)


@pytest.mark.parametrize("family", ["planar", "iso", "rotor", "hurwitz", "turbo", "dense"])
@pytest.mark.parametrize("rotary", ["", "half-split", "interleaved"])
def test_which_rotations_commute_with_which_embeddings(family, rotary):
    """All pass where there is none; only planar pairs pass, and only where the embedding has the same planes."""
    passes = source(FoldModel(rotary=rotary)).equivariant(Rotation.draw(family, 32, 3).matrix())
    assert passes == (not rotary or (rotary == "interleaved" and family == "planar"))


def test_a_reflection_of_a_pair_does_not_commute():
    matrix = Rotation.draw("planar", 32, 3).matrix()
    matrix[0] *= -1
    assert not source(FoldModel(rotary="interleaved")).equivariant(matrix)
    assert source(FoldModel()).equivariant(matrix)


def test_a_norm_is_told():
    assert source(FoldModel(norm=True)).nonlinear == ("rsqrt",)
    assert source(FoldModel()).nonlinear == ()


def test_other_readers_of_the_columns_are_found():
    for packed in (False, True):
        found = source(FoldModel(packed=packed), "v")
        assert escaping(found, found.end) is None  # the other columns of a packed weight do not count
    shared = source(FoldModel(shared=True), "v")
    assert escaping(shared, shared.end) is not None
