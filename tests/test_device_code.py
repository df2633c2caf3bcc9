"""CUDA code in saved libraries: machine code where there is a compiler for it, source where there is none."""

from __future__ import annotations

import shutil

import pytest
import tvm
from tvm.script import ir as I
from tvm.script import tirx as T

from rotquant_tvm import device_code
from rotquant_tvm.codegen import compile_module
from rotquant_tvm.device_code import PackedImports
from rotquant_tvm.errors import DeviceError
from rotquant_tvm.linker import export_library
from rotquant_tvm.target import resolve_target

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
without_driver = pytest.mark.skipif(tvm.cuda().exist, reason="with a driver TVM compiles CUDA code itself")
ELF, CUDA_MACHINE = b"\x7fELF", 190  # NVIDIA's number among ELF machines


@I.ir_module
class Doubled:
    @T.prim_func(s_tir=True)
    def doubled(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        for i in T.thread_binding(64, thread="threadIdx.x"):
            with T.sblock("y"):
                at = T.axis.spatial(64, i)
                y[at] = x[at] * T.float32(2)


def target(arch: str = "sm_90a") -> tvm.target.Target:
    return resolve_target(f"cuda -arch={arch}")


def compiled(arch: str = "sm_90a"):
    return compile_module(Doubled, target(arch))


def module_of(executable):
    return executable.mod if hasattr(executable, "mod") else executable


@needs_nvcc
@without_driver
def test_source_becomes_machine_code(monkeypatch, tmp_path):
    monkeypatch.setenv("TVM_CUDA_COMPILE_MODE", "nvcc")
    executable = compiled()
    packed = PackedImports.of(module_of(executable), target())
    assert packed.code == "cubin" and b"__global__" not in packed.blob
    at = packed.blob.index(ELF)
    assert int.from_bytes(packed.blob[at + 18 : at + 20], "little") == CUDA_MACHINE
    assert b"doubled_kernel" in packed.blob[at:]
    export_library(executable, str(tmp_path / "model.so"), packed.write)
    assert packed.blob in (tmp_path / "model.so").read_bytes()


@without_driver
def test_without_a_compiler_it_stays_source(monkeypatch):
    monkeypatch.setattr(device_code, "cuda_compiler", lambda: None)
    module = module_of(compiled())
    packed = PackedImports.of(module, target())
    assert packed.code == "cuda" and b"__global__" in packed.blob
    plain = tvm.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
    assert packed.blob == plain


@needs_nvcc
def test_code_for_another_device_is_compiled_again(monkeypatch):
    """TVM had compiled it for the device at hand, an sm_90, and the target is an sm_80."""
    content = b"".join(device_code._text(part) for part in ("cubin", "functions", b"\x7fELF for sm_90"))
    monkeypatch.setattr(device_code, "_version_here", lambda: "9.0")
    monkeypatch.setattr(device_code, "cuda_compiler", lambda: "nvcc")
    made = "{} for {}".format
    monkeypatch.setattr(device_code, "_cubin", lambda source, wanted, _: made(source, wanted.attrs["arch"]).encode())
    assert device_code._compiled(content, "code", target("sm_90a")) == ("cubin", content)
    found = device_code._compiled(content, "code", target("sm_80"))
    assert found == ("cubin", b"".join(map(device_code._text, ("cubin", "functions", "code for sm_80"))))
    with pytest.raises(RuntimeError, match="laid out"):
        device_code._compiled(content + b"x", "code", target("sm_80"))


@pytest.mark.parametrize(
    ("arch", "version", "kept"),
    [("sm_90a", "9.0", False), ("sm_80", "9.0", False), ("sm_100a", "9.0", True), ("sm_90a", None, False)],
)
def test_source_that_cannot_run_here_is_kept(monkeypatch, arch, version, kept):
    import os

    monkeypatch.setattr(device_code, "_version_here", lambda: version)
    monkeypatch.delenv(device_code.KEEP_SOURCE, raising=False)
    with device_code.kept_source(target(arch)):
        assert (device_code.KEEP_SOURCE in os.environ) == kept
    assert device_code.KEEP_SOURCE not in os.environ


@needs_nvcc
@without_driver
def test_what_the_compiler_refuses_is_said(monkeypatch):
    monkeypatch.setenv("TVM_CUDA_COMPILE_MODE", "nvcc")
    with pytest.raises(DeviceError, match=r"nvcc cannot compile the kernels for sm_90a: .*error.*nothing") as error:
        device_code._cubin('extern "C" __global__ void f() { nothing; }', target(), "nvcc")
    assert len(str(error.value).splitlines()) == 1


def test_cpu_libraries_are_packed_as_tvm_packs_them():
    host = resolve_target("llvm")

    @I.ir_module
    class Copied:
        @T.prim_func(s_tir=True)
        def copied(x: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")):
            for i in range(4):
                with T.sblock("y"):
                    at = T.axis.spatial(4, i)
                    y[at] = x[at]

    module = module_of(compile_module(Copied, host))
    packed = PackedImports.of(module, host)
    assert packed.code is None
    assert packed.blob == tvm.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()


@pytest.mark.full
@needs_nvcc
@without_driver
@pytest.mark.parametrize(
    ("arch", "devices"),
    [
        ("sm_80", "8.0 to 8.9"),
        ("sm_86", "8.6 to 8.9"),
        ("sm_89", "8.9 to 8.9"),
        ("sm_90a", "capability 9.0"),
        ("sm_100a", "capability 10.0"),
    ],
)
def test_a_model_is_compiled_for_a_gpu_that_is_not_here(arch, devices, tmp_path, monkeypatch):
    """The artifact has machine code, says what device it needs, and is refused for want of one."""
    import torch
    import transformers

    import rotquant_tvm
    from rotquant_tvm.frontend import from_torch
    from rotquant_tvm.runtime import load_library, read_artifact

    monkeypatch.setenv("TVM_CUDA_COMPILE_MODE", "nvcc")
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = from_torch(transformers.LlamaForCausalLM(config).to(torch.float16).eval())
    rotquant_tvm.compile(model, "rq3", target(arch), capacity=128).save(tmp_path / "model.rq")
    needs = read_artifact(tmp_path / "model.rq").manifest.requires
    assert (needs.cuda_arch, needs.cuda_code) == (arch, "cubin") and devices in needs.text
    library = (tmp_path / "model.rq" / "model.so").read_bytes()
    assert b"__global__" not in library and library.count(ELF) >= 2
    with pytest.raises(DeviceError, match="cuda is not available here"):
        load_library(tmp_path / "model.rq")
