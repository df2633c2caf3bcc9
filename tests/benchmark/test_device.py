from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from rotquant_tvm.benchmark.cache_data import CacheSpec
from rotquant_tvm.benchmark.cpu_cache import MOST, UNKNOWN, last_level_cache_bytes
from rotquant_tvm.benchmark.device import compiled, open_device
from rotquant_tvm.benchmark.read_kernel import copy_llvm, read_llvm
from rotquant_tvm.errors import DeviceError, UsageError


def test_the_bandwidth_is_measured(host):
    bandwidth = host.bandwidth()
    assert 1e8 < bandwidth.copy < 1e13 and 1e8 < bandwidth.read < 1e13


def test_the_reading_kernel_reads_everything_and_the_copy_copies(host):
    words = host.words((3, 1024))
    source, sink, target = host.argument(words), host.empty((3, 16), "uint32"), host.empty((3, 1024), "uint32")
    compiled(read_llvm(), host.target)(source, sink)
    compiled(copy_llvm(), host.target)(source, target)
    np.testing.assert_array_equal(np.bitwise_xor.reduce(sink.numpy(), -1), np.bitwise_xor.reduce(words, -1))
    np.testing.assert_array_equal(target.numpy(), words)


def test_arrays(host):
    assert host.words((2, 3)).dtype == np.uint32 and host.normal((4,), "bfloat16").dtype == ml_dtypes.bfloat16
    uniform = host.uniform(2, 3, (1000,), "float16")
    assert uniform.dtype == np.float16 and 2 <= uniform.min() < 2.1 and 2.9 < uniform.max() <= 3
    assert host.view(host.words((2, 3)), "float16").shape == (2, 6)
    assert host.reshape(host.empty((6,), "float32"), (2, 3)).shape == (2, 3)
    assert host.coefficients(np.zeros(0, np.float32)).shape == (1,)


def test_a_device_that_is_not_there_is_an_error():
    import tvm

    if tvm.cuda(0).exist:
        pytest.skip("there is one")
    with pytest.raises(DeviceError, match="GPU at hand"):
        open_device("cuda", 1)
    with pytest.raises(UsageError):
        open_device("opencl", 1)


def test_the_largest_cache_counts(tmp_path):
    for index, size in enumerate(["48K", "2M", "32768K", "nonsense"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_level_cache_bytes(tmp_path) == 32 << 20
    (tmp_path / "index1" / "size").write_text("1G")
    assert last_level_cache_bytes(tmp_path) == MOST
    assert last_level_cache_bytes(tmp_path / "none") == UNKNOWN


@pytest.fixture
def torch_arrays(host):
    """What ``CudaDevice`` does with arrays, in the CPU's memory."""
    pytest.importorskip("torch")
    from rotquant_tvm.benchmark.cuda_device import CudaDevice, require_torch

    class Arrays(CudaDevice):
        where = "cpu"

        def __init__(self) -> None:
            self.torch, self.target = require_torch(), host.target

    return Arrays()


@pytest.mark.parametrize("name", ["f16", "bf16", "iso3", "rq3", "q8_0"])
def test_torchs_arrays_hold_the_same_kinds_of_cache(torch_arrays, small, name):
    spec = CacheSpec.of(name, small("decode"), 2, 300)
    cache, *others = spec.random(torch_arrays)
    assert str(cache.dtype) == "torch.uint32" and len(others) == (2 if name == "rq3" else 0)
    part = torch_arrays.numpy(cache, (1, 1))
    assert part.dtype == np.uint32 and part.shape == cache.shape[2:]
    for codec, encoded in zip(spec.codecs, spec.layout.unpack(part.view(np.uint8)), strict=True):
        values = codec.decode(encoded)
        assert np.isfinite(values).all() and 0.4 < values.std() < 2.5


def test_torchs_arrays(torch_arrays):
    array = torch_arrays.native(np.arange(6, dtype=np.int32))
    assert torch_arrays.numpy(torch_arrays.reshape(array, (2, 3)), 1).tolist() == [3, 4, 5]
    assert torch_arrays.cast(array, "float16").element_size() == 2
    assert str(torch_arrays.empty((3,), "uint32").dtype) == "torch.uint32"
    x = torch_arrays.normal((5, 4), "float32")
    assert torch_arrays.numpy(x, (slice(1, 3), [0, 2])).shape == (2, 2)


@pytest.mark.parametrize("faster", ["copy", "copy by a kernel"])
def test_the_bandwidth_counts_what_is_copied_and_read(torch_arrays, monkeypatch, faster):
    """The arithmetic of ``CudaDevice.bandwidth``, with kernels and times that are made up."""
    from rotquant_tvm.benchmark import cuda_device
    from rotquant_tvm.benchmark.contender import Outcome

    seen = []
    monkeypatch.setattr(cuda_device, "compiled", lambda *_: lambda words, sink: seen.append(4 * len(words)))
    monkeypatch.setattr(type(torch_arrays), "rotated_bytes", lambda _: 3 * cuda_device.READ_BYTES + 5)

    def race(contenders):
        for contender in contenders:
            for call in contender.calls:
                call()
        times = {"copy": 3e-3, "copy by a kernel": 3e-3, faster: 2e-3}
        return {c.name: Outcome(times.get(c.name, 1e-3 * i)) for i, c in enumerate(contenders)}

    monkeypatch.setattr(type(torch_arrays), "race", lambda _, contenders: race(contenders))
    bandwidth = torch_arrays.bandwidth()
    nbytes = 3 * cuda_device.READ_BYTES
    assert seen == [nbytes] * (cuda_device.SETS * len(cuda_device.READ_VARIANTS))
    assert bandwidth.copy == pytest.approx(2 * nbytes / 2e-3) and bandwidth.read == pytest.approx(nbytes / 2e-3)
