"""Loading a library: devices, capacities, weights that do not fit."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import tvm

from rotquant_tvm.errors import ArtifactError, DeviceError, UsageError
from rotquant_tvm.runtime import CompiledLibrary, KVCacheInfo, load, load_library
from rotquant_tvm.runtime.device import parse_device
from rotquant_tvm.runtime.library import _placed


@pytest.mark.parametrize(
    "target", ["llvm -mcpu=skylake", {"kind": "llvm"}, '{"kind":"llvm"}', "host/some-tag"]
)
@pytest.mark.parametrize("device", [None, "cpu", "cpu:0"])
def test_a_cpu_library_loads_on_the_cpu(write, tmp_path, target, device):
    session = load(write(tmp_path / "a", target=target), device)
    assert session.library.device == tvm.cpu() and session.batch == 1


def test_a_library_runs_only_where_it_was_compiled_for(write, tmp_path):
    path = write(tmp_path / "a")
    with pytest.raises(UsageError, match=r"compiled for llvm and cannot run on 'cuda:1'.*device='cpu'"):
        load(path, "cuda:1")
    for target in ("cuda -arch=sm_90a", {"kind": "cuda", "arch": "sm_90a"}, '{"kind":"cuda"}'):
        write(path, target=target)
        with pytest.raises(UsageError, match="device='cuda'"):
            load(path, "cpu")


@pytest.mark.skipif(tvm.cuda().exist, reason="needs a machine without CUDA")
def test_an_absent_device_is_a_device_error(write, tmp_path):
    with pytest.raises(DeviceError, match="cuda is not available") as error:
        load(write(tmp_path / "a", target="cuda"))
    assert error.value.exit_status == 3


@pytest.mark.parametrize("name", ["", "gpu9", "CPU", "cuda:", "cuda:x", "warp", 3])
def test_unknown_devices_are_refused(name):
    with pytest.raises(UsageError, match="unknown device"):
        parse_device(name)


def test_load_passes_batch_and_capacity_on(artifact):
    session = load(artifact, batch=3, capacity=50)
    assert (session.batch, session.capacity) == (3, 50)
    assert session.library.session().capacity == 128


def test_a_library_for_one_batch_takes_no_other(library, fake_model):
    fixed = copy.copy(library)
    fixed.info = dataclasses.replace(library.info, batch=2)
    session = fixed.session(capacity=40)
    assert session.batch == 2 and library.session().batch == 1
    session.prefill([[1, 2], [3]])
    for refused in (
        lambda: fixed.session(batch=1),
        lambda: session.reset(batch=3),
        lambda: session.reorder([0]),
        lambda: session.stream([[1], [2], [3]], max_tokens=1),
    ):
        with pytest.raises(UsageError, match=r"for a batch of 2 .*use batch=2, or compile it again"):
            refused()
    assert session.lengths.tolist() == [2, 1]
    session.reorder([1, 1])
    assert session.lengths.tolist() == [1, 1]


@pytest.mark.parametrize("batch", [0, -1, True, "2", None])
def test_a_bad_batch_in_the_librarys_description_is_refused(fake_model, batch):
    assert KVCacheInfo.from_document(fake_model.INFO).batch is None
    assert KVCacheInfo.from_document(fake_model.INFO | {"batch": 4}).batch == 4
    with pytest.raises(ArtifactError, match="'batch'"):
        KVCacheInfo.from_document(fake_model.INFO | {"batch": batch})


@pytest.mark.parametrize(("default", "expected"), [(None, 4096), (100, 100), (10**6, 4096)])
def test_default_capacity_stays_within_the_models_positions(write, tmp_path, default, expected):
    assert load(write(tmp_path / "a", default_capacity=default)).capacity == expected


def test_a_wrong_number_of_weights_is_refused(fake_model, library_bytes, tmp_path):
    (tmp_path / "model.so").write_bytes(library_bytes)
    module = tvm.runtime.load_module(str(tmp_path / "model.so"))
    with pytest.raises(ArtifactError, match="takes 2 weights and 1 were given"):
        CompiledLibrary(module, list(fake_model.weights().values())[:1], tvm.cpu())


def test_weights_are_shared_by_sessions(artifact):
    library = load_library(artifact)
    first, second = library.session(), library.session(batch=2)
    assert first.library.weights is second.library.weights
    first.prefill([1, 2, 3])
    assert second.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.T, lambda x: x[1:, 3:], lambda x: x.requires_grad_()])
def test_weights_may_be_torch_tensors(view):
    torch = pytest.importorskip("torch")
    weight = view(torch.arange(35.0).reshape(5, 7))
    placed = _placed(weight, tvm.cpu())
    np.testing.assert_array_equal(placed.numpy(), weight.detach().numpy())
