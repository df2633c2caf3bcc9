"""Targets as users write them."""

from __future__ import annotations

import pytest
import tvm

from rotquant_tvm.errors import DeviceError, UsageError
from rotquant_tvm.target import _with_own_instructions, host_target, resolve_target


def test_llvm_is_this_cpu():
    target = resolve_target("llvm")
    assert target.kind.name == "llvm" and target.attrs["mcpu"] == host_target().attrs["mcpu"] != ""


@pytest.mark.parametrize("text", ["llvm -mcpu=x86-64-v3 -num-cores=3", '{"kind": "llvm", "mcpu": "x86-64-v3"}'])
def test_options_and_json_are_understood(text):
    assert resolve_target(text).attrs["mcpu"] == "x86-64-v3"
    assert "3" not in text[-2:] or resolve_target(text).attrs["num-cores"] == 3


@pytest.mark.parametrize("text", ["llvm -mcpu=x86-64-v3", '{"kind": "llvm", "mcpu": "x86-64-v3"}\n'])
def test_a_file_says_what_its_text_says(text, tmp_path):
    path = tmp_path / "cpu.json"
    path.write_text(text)
    assert resolve_target(str(path)).attrs["mcpu"] == "x86-64-v3"


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"[" * 100_000, b""])
def test_a_file_that_is_no_target_is_refused(content, tmp_path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as refused:
        resolve_target(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["nvidia/nvidia-h100", "cuda -arch=sm_90a -max_num_threads=1024"])
def test_a_gpu_gets_a_host_without_this_cpus_extensions(text):
    target = resolve_target(text)
    assert target.kind.name == "cuda" and target.attrs["arch"] == "sm_90a"
    assert target.host.kind.name == "llvm" and target.host.attrs["mcpu"] in ("x86-64", "generic")


def test_a_host_that_is_named_stays():
    text = '{"kind": "cuda", "arch": "sm_80", "host": {"kind": "llvm", "mcpu": "x86-64-v3"}}'
    assert resolve_target(text).host.attrs["mcpu"] == "x86-64-v3"


def test_targets_are_taken_as_they_are():
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2"})
    assert resolve_target(target).same_as(target)


@pytest.mark.parametrize("text", ["", "abacus", "llvm mcpu=x", "llvm -mcpu", "llvm -colour=red", "{", "vulkan", "c"])
def test_other_targets_are_refused_by_name(text):
    with pytest.raises(UsageError, match=f"'{text}'" if text else "target"):
        resolve_target(text)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("cdua", "cuda"),
        ("llvmm", "llvm"),
        ("lvm -mcpu=x86-64-v3", "llvm"),
        ("CUDA", "cuda"),
        ("nvidia/nvidia-h10", "nvidia/nvidia-h100 or"),
        ("H100", "nvidia/nvidia-h100"),
    ],
)
def test_what_was_probably_meant(text, meant):
    with pytest.raises(UsageError, match=f"unknown target '{text}'; did you mean {meant}.* give llvm"):
        resolve_target(text)


def test_what_is_like_no_target_gets_the_forms_that_there_are():
    with pytest.raises(UsageError, match=r"unknown target 'cpu'; give llvm .* or a tag like nvidia/nvidia-h100"):
        resolve_target("cpu")


@pytest.mark.skipif(tvm.cuda().exist, reason="there is a CUDA device here")
def test_cuda_without_a_device():
    with pytest.raises(DeviceError, match="sm_90a"):
        resolve_target("cuda")


@pytest.mark.parametrize(("arch", "expected"), [("sm_90", "sm_90a"), ("sm_90a", "sm_90a"), ("sm_86", "sm_86")])
def test_the_gpu_at_hand_has_its_own_instructions(arch, expected):
    target = tvm.target.Target({"kind": "cuda", "arch": arch, "max_threads_per_block": 512, "thread_warp_size": 32})
    found = _with_own_instructions(target)
    assert found.attrs["arch"] == expected and int(found.attrs["max_threads_per_block"]) == 512
