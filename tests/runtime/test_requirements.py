"""What a library asks of a machine: said before it is loaded, and by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rotquant_tvm.errors import ArtifactError, DeviceError
from rotquant_tvm.runtime import Requirements, load, requirements
from rotquant_tvm.runtime.requirements import cpu_features, devices_of, machine_name, runs_on

V4 = ("avx2", "avx512f", "avx512vl")


def gpu(version: str, name: str = "NVIDIA A100"):
    return SimpleNamespace(compute_version=version, device_name=name, type="cuda")


@pytest.mark.parametrize(
    "needs",
    [
        Requirements("x86_64", "znver5", V4),
        Requirements("aarch64"),
        Requirements("x86_64", "x86-64", (), "sm_90a", "cubin"),
    ],
)
def test_the_document_is_read_back(needs):
    assert Requirements.from_document(needs.document(), "here") == needs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"machine": 3}, "'machine' is 3"),
        ({"cpu": {"name": "x", "features": [1]}}, "cpu features"),
        ({"cpu": {"name": "x"}}, "no entry 'features'"),
        ({"cuda": {"arch": "90", "code": "cubin"}}, "'90'"),
        ({"cuda": {"arch": "sm_90", "code": "exe"}}, "'exe'"),
        ({"cuda": {"arch": "sm_90"}}, "no entry 'code'"),
    ],
)
def test_documents_that_are_none_are_refused(change, said):
    document = Requirements("x86_64").document() | change
    with pytest.raises(ArtifactError, match=said):
        Requirements.from_document(document, "here")


def test_a_cpu_that_lacks_something_is_told_what(monkeypatch):
    monkeypatch.setattr(requirements, "cpu_features", lambda: frozenset({"avx2", "sse4_2"}))
    needs = Requirements(machine_name(), "znver5", V4)
    with pytest.raises(DeviceError, match=r"model\.so .* avx512f, avx512vl \(znver5\), which this one lacks.*-mcpu"):
        needs.check_cpu("model.so")
    monkeypatch.setattr(requirements, "cpu_features", lambda: frozenset(V4))
    needs.check_cpu("model.so")
    monkeypatch.setattr(requirements, "cpu_features", lambda: None)  # a system that does not tell
    needs.check_cpu("model.so")


def test_another_kind_of_cpu_is_refused():
    other = "aarch64" if machine_name() == "x86_64" else "x86_64"
    with pytest.raises(DeviceError, match=f"compiled for {other} and this is {machine_name()}"):
        Requirements(other).check_cpu("model.so")


@pytest.mark.parametrize(
    ("arch", "code", "runs", "does_not"),
    [
        ("sm_80", "cubin", ["8.0", "8.6", "8.9"], ["7.5", "9.0", "10.0"]),
        ("sm_86", "cubin", ["8.6", "8.9"], ["8.0", "9.0"]),
        ("sm_90a", "cubin", ["9.0"], ["8.0", "10.0", "12.0"]),
        ("sm_100a", "cubin", ["10.0"], ["9.0", "10.3", "12.0"]),
        ("sm_100f", "cubin", ["10.0", "10.3"], ["9.0", "12.0"]),
        ("sm_120", "fatbin", ["12.0", "12.1"], ["10.0"]),
        ("sm_80", "cuda", ["8.0", "8.9", "9.0", "12.0"], ["7.5"]),
        ("sm_90a", "cuda", ["9.0"], ["10.0"]),
        ("sm_80", "ptx", ["8.0", "9.0"], ["7.5"]),
    ],
)
def test_devices_that_run_kernels(arch, code, runs, does_not):
    assert all(runs_on(arch, code, version) for version in runs)
    assert not any(runs_on(arch, code, version) for version in does_not)
    major, minor = runs[0].split(".")
    assert f"compute capability {major}.{minor}" in devices_of(arch, code)


def test_a_device_of_another_architecture_is_refused_by_name():
    needs = Requirements("x86_64", cuda_arch="sm_90a", cuda_code="cubin")
    needs.check_gpu(gpu("9.0"), "model.so")
    said = r"model\.so was .* for sm_90a .* NVIDIA A100 \(sm_80\); use a device of compute capability 9\.0, .*sm_80"
    with pytest.raises(DeviceError, match=said):
        needs.check_gpu(gpu("8.0"), "model.so")


def test_the_text_says_what_is_needed():
    assert Requirements("x86_64", "", ("avx2",)).text == "x86_64 CPU with avx2"
    text = Requirements("x86_64", cuda_arch="sm_80", cuda_code="cuda").text
    assert "8.0 or later" in text and "compiled at load" in text


def test_an_artifact_is_refused_before_its_code_is_loaded(write, tmp_path):
    """The library is no library: had it been loaded first, that would have been said."""
    needs = Requirements(machine_name(), "future-cpu", ("avx8192",))
    path = write(tmp_path / "model.rq", library=b"none", requires=needs)
    with pytest.raises(DeviceError, match="avx8192") as error:
        load(path)
    assert error.value.exit_status == 3


@pytest.mark.skipif(machine_name() != "x86_64", reason="the names are those of x86")
def test_this_cpu_has_what_every_such_cpu_has():
    found = cpu_features()
    assert found is None or {"sse2", "fxsr"} <= found
