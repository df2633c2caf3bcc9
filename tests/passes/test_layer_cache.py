"""LayerCache: the arrays of a layer, as types, as they are allocated and as the runtime counts them."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.passes.find_attention import find_attention
from rotquant_tvm.passes.layer_cache import LayerCache
from tvm import relax, tirx

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.errors import FormatError
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.runtime.cache_info import KVCacheInfo

from .tiny_model import TinyModel

CACHES = [
    "hurwitz3",
    "q8_0/iso3",
    "hurwitz3,sinks=4",
    "iso4/planar2,recent=7",
    "hurwitz3,sinks=3,recent=2,center=32",
    "turbo2,center=96",
    "hurwitz3:ip/q8_0,sinks=1,recent=5,center=64,defer=40",
]


def layer_cache(kv_cache: str, layer: int = 0, layers: str | None = None, **sizes) -> LayerCache:
    model = TinyModel(**{"head_dim": 64, "kv_heads": 2} | sizes)
    sites = find_attention(model.module()["main"])
    return LayerCache.of(sites[layer], len(sites), KVCacheConfig.parse(kv_cache, layers))


def shape_of(type_: relax.TensorType) -> tuple[int, ...]:
    """A static shape."""
    return tuple(int(size) for size in type_.shape.values)


def created(layer: LayerCache, batch: int, capacity: int) -> list[relax.TensorType]:
    """What is allocated."""
    return layer.created(*(tirx.const(size, "int64") for size in (batch, capacity)))


@pytest.mark.parametrize("window", [None, 1, 40, 100])
@pytest.mark.parametrize("kv_cache", CACHES)
def test_what_is_allocated_is_what_the_runtime_counts(kv_cache, window):
    """Shapes by ``CachePolicy``'s own arithmetic; bytes by the runtime's, from the description alone.

    With a window, the blocks that it can lie in and one that is being filled, if the capacity is not less.
    """
    layer = layer_cache(kv_cache, window=window)
    policy = layer.policy
    document = {"version": 3, "layout_version": 1, "layers": [layer.describe()], "vocab_size": 5, "max_position": 9}
    info = KVCacheInfo.from_document(document | {"dtype": "float32", "weights": ["w"]})
    assert info.policy == policy and [ring.window for ring in info.rings] == ([window] if window else [])
    for capacity in (1, 31, 33, 36, 37, 69, 100, 101, 110, 1000):
        found = created(layer, 3, capacity)
        tiles = policy.packed_tiles(capacity) if policy.segmented else -(-capacity // 32)
        if window:
            block = max(1, policy.block // 32)
            tiles = min(tiles, (-(-window // (32 * block)) + 1) * block)
        shapes = [(3, 2, tiles, layer.tile_bytes // 4)]
        if policy.center:
            shapes.append((3, 2, tiles * 32 // policy.center, 64 // 4 + 1))
        if policy.segmented:
            shapes.append((3, 2, 2, policy.sinks + policy.ring, 64))
        assert [shape_of(t) for t in found] == shapes, capacity
        live = sum(np.prod(shape_of(t)) * np.dtype(str(t.dtype)).itemsize for t in found)
        assert info.cache_bytes(3, capacity) == live, capacity


def test_parameters_share_sizes_where_policies_do():
    """By name within a function: the layers of one policy have as many tiles; one without has its own number."""
    batch = tirx.Var("batch", "int64")
    parameters = [layer_cache("hurwitz3,sinks=3,center=32", i, "1=f16").parameters(batch) for i in range(2)]
    assert [[p.name for p in row] for row in parameters] == [["cache_0", "centre_0", "plain_0"], ["cache_1"]]
    tiles = [str(row[0].ty.shape[2]) for row in parameters]
    assert tiles == ["tiles", "tiles_straight"] and str(parameters[0][1].ty.shape[2]) == "blocks"
    for row in parameters:
        assert all(p.ty.shape[0].same_as(batch) for p in row)
    assert [str(p.ty.dtype) for p in parameters[0]] == ["uint32", "uint32", "float16"]


def test_parameters_share_sizes_where_windows_do_too():
    batch = tirx.Var("batch", "int64")
    parameters = [layer_cache("hurwitz3,center=32", i, "1=f16", window=40).parameters(batch) for i in range(2)]
    assert [str(row[0].ty.shape[2]) for row in parameters] == ["tiles_window40", "tiles_straight_window40"]
    assert str(parameters[0][1].ty.shape[2]) == "blocks_window40"


def test_a_layer_of_16_bits_has_no_policy():
    layer = layer_cache("hurwitz3,sinks=3,center=32", 1, "-1=bf16/f16")
    assert layer.policy == CachePolicy() and "policy" not in layer.describe()
    assert layer.tile_bytes == 32 * 64 * 2 * 2
    other = layer_cache("hurwitz3,sinks=3,center=32", 0, "-1=bf16/f16")
    assert other.describe()["policy"] == {"sinks": 3, "recent": 0, "center": 32, "defer": 0}
    assert [codec.format.name for codec in other.codecs] == ["hurwitz3", "hurwitz3"]


def test_keys_and_values_of_each_layer_have_rotations_of_their_own():
    rotations = [codec.rotation.matrix() for i in range(2) for codec in layer_cache("hurwitz3", i).codecs]
    for i, one in enumerate(rotations):
        assert not any(np.array_equal(one, other) for other in rotations[:i])


def test_a_head_dim_that_the_format_cannot_take():
    with pytest.raises(FormatError, match="turbo3 cannot take head_dim 96"):
        layer_cache("turbo3", head_dim=96)
