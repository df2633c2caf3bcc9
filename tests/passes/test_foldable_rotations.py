"""Where a function applies rotations, and what is proven of each before it may move."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.passes.foldable_rotations import ROLES, FoldableRotations
from rotquant_tvm.passes.hoist_rotation import HoistRotation
from rotquant_tvm.passes.quantize_kv_cache import QuantizeKVCache

from rotquant_tvm.kv_cache_config import KVCacheConfig

from .fold_models import GPT2, FoldModel
from .tiny_model import TinyModel


def rotations(model: TinyModel, formats: str, name: str, hoist: bool = True) -> FoldableRotations:
    with tvm.target.Target("llvm"):
        mod = QuantizeKVCache(KVCacheConfig.parse(formats))(model.module())
        mod = HoistRotation()(mod) if hoist else mod
    return FoldableRotations(mod, mod[name])


@pytest.mark.parametrize("formats", ["iso3/hurwitz3", "iso3/hurwitz3,sinks=2,recent=4,center=32"])
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_each_layer_has_its_own_four_rotations(formats, name):
    model, config = TinyModel(), KVCacheConfig.parse(formats)
    found = rotations(model, formats, name)
    assert len(found.layers) == 2
    for index, layer in enumerate(found.layers):
        codecs = config.codecs(index, 2, model.head_dim)
        assert set(layer) == set(ROLES)
        for role, codec in (("k", codecs[0]), ("q", codecs[0]), ("v", codecs[1]), ("out", codecs[1])):
            np.testing.assert_allclose(layer[role].rotation.matrix(), codec.rotation.matrix(), atol=1e-6)


def test_the_weights_of_every_fold():
    found = rotations(GPT2, "iso3", "decode")
    folds = {role: found.fold(0, role) for role in ROLES}
    assert not any(fold.reason for fold in folds.values())
    assert {role: [(r.weight, r.axis, r.starts) for r in fold.weights] for role, fold in folds.items()} == {
        "q": [(2, 1, (0, 32)), (3, 0, (0, 32))],
        "k": [(2, 1, (64, 96)), (3, 0, (64, 96))],
        "v": [(2, 1, (128, 160)), (3, 0, (128, 160))],
        "out": [(4, 0, (0, 32))],
    }


def test_a_weight_that_is_stored_out_in_changes_along_its_first_axis():
    (record,) = rotations(FoldModel(), "iso3", "prefill").fold(0, "v").weights
    assert (record.weight, record.axis, record.starts) == (4, 0, (0, 32))


def test_without_hoisting_a_chunk_still_reads_its_keys_and_values_raw():
    """So nothing may come rotated: a fold is proven where it is made, not by the order of passes."""
    found = rotations(TinyModel(layers=1), "iso3", "prefill", hoist=False)
    assert [found.fold(0, role).reason for role in "kv"] == ["it has another reader"] * 2


def test_formats_without_rotations_have_none():
    assert rotations(TinyModel(layers=1), "f16/q8_0", "decode").layers == [{}]
