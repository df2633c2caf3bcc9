"""Building other projects' sources: with a stand-in of ours for such a source, since theirs are not here."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from rotquant_tvm.benchmark import peers
from rotquant_tvm.benchmark.peers import Peers, find_source
from rotquant_tvm.errors import UsageError

ISO = "isoquant/csrc/isoclinic_fused_kernel.cu"
DEVICE = SimpleNamespace(target=SimpleNamespace(attrs={"arch": "sm_90a"}))

SOURCE = """
#include <torch/extension.h>
template <typename T> __global__ void twice(const T* x, T* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + x[i];
}
template <typename T> torch::Tensor run(torch::Tensor x, torch::Tensor a, torch::Tensor b, torch::Tensor c, int n) {
  auto y = torch::empty_like(x);
  int size = x.size(0) * x.size(1);
  twice<T><<<(size + 255) / 256, 256>>>(x.data_ptr<T>(), y.data_ptr<T>(), size);
  return y;
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("isoclinic_full_fused_float", &run<float>);
  m.def("isoclinic_full_fused_half", &run<c10::Half>);
}
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def checkout(tmp_path):
    """A folder with a checkout that has one of the sources."""
    file = tmp_path / "peers" / "isoquant-main" / ISO
    file.parent.mkdir(parents=True)
    file.write_text(SOURCE)
    return tmp_path / "peers"


def test_a_source_is_found_in_a_checkout_or_in_a_folder_of_checkouts(checkout):
    file = checkout / "isoquant-main" / ISO
    assert find_source(checkout, ISO) == file and find_source(checkout / "isoquant-main", ISO) == file
    assert find_source(checkout, "turboquant/csrc/rotor_fused_kernel.cu") is None


def test_a_folder_without_any_is_refused(tmp_path):
    with pytest.raises(UsageError, match="ParaMind2025/isoquant"):
        Peers(tmp_path, DEVICE)


def test_without_nvcc_the_reason_is_a_note(checkout, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    built = Peers(checkout, DEVICE)
    assert any("nvcc is not on the PATH" in note for note in built.notes)
    assert any("rotor_fused_kernel.cu is not in" in note for note in built.notes)
    assert built._libraries == {}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_source_is_built_once_and_only_known_bindings_are_called(checkout, monkeypatch):
    library = Peers(checkout, DEVICE)._libraries[ISO]
    assert library.launch(b"no_such_binding", b"tttti", None, None, 0, 0, None) == -1
    assert library.launch(b"isoclinic_full_fused_half", b"", None, None, 0, 0, None) == -2
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)  # from now on nothing can be built
    assert ISO in Peers(checkout, DEVICE)._libraries
    (built,) = (peers.cache_folder() / "peers").iterdir()
    built.rename(checkout / built.name)  # as if it had been built elsewhere
    assert ISO in Peers(checkout, DEVICE)._libraries
    (checkout / "isoquant-main" / ISO).write_text(SOURCE + "// changed\n")
    assert ISO not in Peers(checkout, DEVICE)._libraries


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_source_that_does_not_compile_is_a_note(checkout):
    (checkout / "isoquant-main" / ISO).write_text(SOURCE.replace("empty_like", "no_such_function"))
    built = Peers(checkout, DEVICE)
    assert ISO not in built._libraries
    assert any("isoclinic_fused_kernel.cu was not built" in note and "error" in note for note in built.notes)


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_peer_with_a_wrong_result_is_not_raced(checkout):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from rotquant_tvm.benchmark.device import open_device
    from rotquant_tvm.formats import KVFormat

    device = open_device("cuda", 2)
    x = torch.nn.functional.normalize(torch.randn(600, 128, device="cuda"))
    y = torch.empty_like(x)
    (contender,) = Peers(checkout, device).contenders("iso-full", KVFormat.parse("iso3-full").codec(128), [(x, y)])
    outcome = device.race([contender])["IsoQuant"]
    assert outcome.seconds is None and "wrong result" in outcome.note
    assert torch.equal(y, 2 * x)
