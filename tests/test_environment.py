"""What a machine offers, and what is said about what is missing."""

from __future__ import annotations

import importlib.metadata

import pytest

import rotquant_tvm
from rotquant_tvm import environment
from rotquant_tvm.environment import PACKAGES, hints

EVERYTHING = dict.fromkeys(PACKAGES, "1.0")
WIDE = {"vector_lanes": 16}
TOOLS = {"linker": "g++", "nvcc": None, "nvrtc": "of cuda-bindings"}
GPU = {"slug": "nvidia-h200", "name": "NVIDIA H200", "arch": "sm_90"}
LOG = {"folder": "/logs/nvidia-h200", "slug": "nvidia-h200"}


def topics(installed=EVERYTHING, processor=WIDE, devices=(GPU,), tools=TOOLS, logs=(LOG,)):
    return [hint.topic for hint in hints(dict(installed), dict(processor), list(devices), dict(tools), list(logs))]


def test_a_complete_machine_needs_no_hint():
    assert topics() == []


@pytest.mark.parametrize(
    ("topic", "missing"),
    [
        ("linker", {"tools": TOOLS | {"linker": None}}),
        ("cuda", {"tools": TOOLS | {"nvrtc": None}}),
        ("gpu", {"devices": (GPU | {"arch": "sm_75"},)}),
        ("torch", {"installed": EVERYTHING | {"torch": None}}),
        ("transformers", {"installed": EVERYTHING | {"transformers": None}}),
        ("onnx", {"installed": EVERYTHING | {"onnx": None}}),
        ("cpu", {"processor": {"vector_lanes": 8}}),
        ("gpu", {"devices": ()}),
        ("tuning", {"logs": ()}),
        ("tuning", {"logs": (LOG, {"folder": "/logs/x", "problem": "/logs/x: damaged"})}),
        ("tuning", {"logs": ({"folder": "/logs/nvidia-h100", "slug": "nvidia-h100"},)}),
    ],
)
def test_each_thing_missing_is_told_once(topic, missing):
    assert topics(**missing) == [topic]


def test_either_cuda_compiler_is_enough():
    nvcc = TOOLS | {"nvcc": "/usr/local/cuda/bin/nvcc"}
    assert topics(tools=nvcc | {"nvrtc": None}) == topics(tools=nvcc) == []
    assert topics(devices=(), tools=TOOLS | {"nvrtc": None}) == ["gpu"]


def test_compilers_are_those_that_a_compile_would_find(monkeypatch):
    from rotquant_tvm import cuda_compiler

    for there in (False, True):
        monkeypatch.setattr(cuda_compiler, "is_there", lambda _name, there=there: there)
        assert (environment.compilers()["nvrtc"] is not None) == there


def test_versions_are_those_that_are_installed():
    found = environment.versions()
    assert found["rotquant-tvm"] == rotquant_tvm.__version__
    assert found["apache-tvm"] == importlib.metadata.version("apache-tvm")
    assert set(PACKAGES) < set(found)


def test_the_cpu_is_the_target_that_llvm_means():
    from rotquant_tvm.target import host_target

    found = environment.cpu()
    assert found["target"] == str(host_target()) and found["vector_lanes"] in (4, 8, 16) and found["cores"] > 0


def test_without_a_compiler_there_is_no_linker(monkeypatch):
    from rotquant_tvm.errors import DeviceError

    def none():
        raise DeviceError("no C++ compiler")

    monkeypatch.setattr(environment, "linker_words", none)
    assert environment.compilers()["linker"] is None


def test_logs_that_cannot_be_read_say_why(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = tmp_path / "rotquant_tvm" / "tuning_logs" / "nvidia-x"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"format": "rotquant-tvm-tuning-log"')
    damaged = [log for log in environment.tuning_logs() if log["folder"] == str(folder)]
    assert len(damaged) == 1 and str(folder) in damaged[0]["problem"]
