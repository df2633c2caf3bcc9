"""Arguments to measure with: full caches, finite numbers, lengths that the operators' own rules allow."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm.benchmark.device import open_device
from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import KVFormat, TileLayout
from rotquant_tvm.tuning.arguments import RESULTS, Measurement, Parameter
from rotquant_tvm.tuning.kernel_shape import KernelShape
from rotquant_tvm.tuning.shape_buckets import default_buckets, shapes_in, size_names
from rotquant_tvm.tuning.task_sources import vector_definitions

CACHES = ["hurwitz3", "f16", "bf16/q8_0", "rq3", "turbo2.5/hurwitz2+tcq", "hurwitz4,sinks=4,recent=40"]


@pytest.fixture(scope="module")
def device(llvm):
    return open_device(llvm, 1)


def measurements(functions):
    """Of every operator that can be measured, at its smaller bucket."""
    for func in functions:
        shape = KernelShape.of(func)
        if shape.operator in RESULTS:
            bucket = default_buckets(shape, size_names(func), "llvm")[0]
            yield Measurement(shape, tuple(Parameter(*found) for found in shapes_in(func, bucket)))


@pytest.mark.parametrize("kv_cache", CACHES)
def test_arrays_are_the_definitions_parameters(definitions, device, kv_cache):
    for measurement in measurements(definitions(kv_cache).values()):
        for parameter, array in zip(measurement.parameters, measurement.arrays(device), strict=True):
            values = device.numpy(array)
            assert values.shape == parameter.shape and str(values.dtype) == parameter.dtype
            if parameter.dtype.startswith("float"):
                assert np.isfinite(values.astype(np.float64)).all()
        assert measurement.results


@pytest.mark.parametrize("kv_cache", CACHES)
def test_tiles_decode_to_moderate_numbers(definitions, device, kv_cache):
    measurement = next(m for m in measurements([definitions(kv_cache)["attention_decode"]]))
    names = [parameter.name for parameter in measurement.parameters]
    words = device.numpy(measurement.arrays(device)[names.index("cache")])
    k, v = (KVFormat.parse(measurement.shape.properties[role]) for role in "kv")
    layout = TileLayout(k, v, 64)
    for encoded, found in zip(layout.unpack(words[:, :, :4].view(np.uint8)), (k, v), strict=True):
        decoded = found.codec(64).decode_rotated(encoded)
        assert np.isfinite(decoded).all() and 1e-3 < np.abs(decoded).max() < 1e3


@pytest.mark.parametrize("kv_cache", CACHES)
def test_counts_are_what_the_policy_allows(definitions, device, kv_cache):
    for measurement in measurements(definitions(kv_cache).values()):
        names = [parameter.name for parameter in measurement.parameters]
        arrays = dict(zip(names, (device.numpy(a) for a in measurement.arrays(device)), strict=True))
        if "lengths" not in arrays:
            continue
        policy = CachePolicy.parse(measurement.shape.properties.get("policy", ""))
        length, capacity = int(arrays["lengths"][0]), 32 * arrays["cache"].shape[2]
        packed = int(arrays["packed"][0]) if "packed" in arrays else length
        new = int(arrays["new_lengths"][0]) if "new_lengths" in arrays else 1
        assert new <= length and packed <= capacity and packed % (policy.block if policy.segmented else 1) == 0
        assert length - packed <= policy.sinks + policy.ring + new
        if "before" in arrays:
            assert 0 <= arrays["before"][0] < packed


def test_moved_bytes_are_the_packed_bytes(definitions):
    """Decode attention at long contexts reads the cache and little else."""
    func = definitions()["attention_decode"]
    parameters = tuple(Parameter(*found) for found in shapes_in(func, {"batch": 8, "tiles": 1024}))
    measurement = Measurement(KernelShape.of(func), parameters)
    cache = 8 * 2 * 1024 * TileLayout(*[KVFormat.parse("hurwitz3")] * 2, 64).tile_bytes
    assert cache < measurement.moved_bytes() < 1.001 * cache


def test_moved_bytes_of_an_append_are_the_new_tokens(definitions):
    func = definitions()["append"]
    sizes = {"batch": 1, "seq": 64, "tiles": 1000}
    measurement = Measurement(KernelShape.of(func), tuple(Parameter(*p) for p in shapes_in(func, sizes)))
    raw = 2 * 64 * 2 * 64 * 4  # K and V, tokens, heads, head_dim, float32
    assert raw < measurement.moved_bytes() <= raw + 2 * 3 * TileLayout(*[KVFormat.parse("hurwitz3")] * 2, 64).tile_bytes
    assert measurement.nbytes > 10 * measurement.moved_bytes()


def test_vectors_and_codes(llvm, device):
    functions = vector_definitions(["hurwitz3"], 64, "float32", llvm)
    assert len(functions) == 3
    for func in functions:
        shape = KernelShape.of(func)
        parameters = [Parameter(*p) for p in shapes_in(func, dict.fromkeys(size_names(func), 4))]
        arrays = Measurement(shape, tuple(parameters)).arrays(device)
        values = {p.name: device.numpy(array) for p, array in zip(parameters, arrays, strict=True)}
        if shape.operator == "dequantize":
            assert values["codes"].max() < 8 and 0.5 <= values["gain"].min() <= values["gain"].max() <= 1.5
