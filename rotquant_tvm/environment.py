"""What this machine and this Python offer a compile: versions, devices, compilers, folders; what is missing and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from typing import Any

from .errors import DeviceError

PACKAGES = (
    *("apache-tvm", "apache-tvm-ffi", "numpy", "torch", "transformers", "gguf", "onnx", "onnxruntime"),
    *("tokenizers", "safetensors", "matplotlib", "xgboost", "tornado", "ziglang", "cuda-bindings"),
)
"""Packages whose versions are told, optional ones included."""
OLDEST = 80
"""The least compute capability, times 10, that the kernels laid out by hand are for."""


@dataclass(frozen=True)
class Hint:
    """Something that is missing or slow here. ``topic``: of what; ``text``: what it costs and what to do."""

    topic: str
    text: str


def versions() -> dict[str, str | None]:
    """The installed version of this package, Python and each of ``PACKAGES``; None for one that is not installed."""
    from . import __version__

    found: dict[str, str | None] = {"rotquant-tvm": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu() -> dict[str, Any]:
    """Describe this CPU: name, cores, instruction-set level, float32 lanes of a vector, and its TVM target."""
    from .schedules.vector_target import VectorTarget
    from .target import host_target
    from .tuning.device_identity import cpu_levels, cpu_name

    target = host_target()
    return {
        "name": cpu_name() or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "level": cpu_levels(target)[0],
        "vector_lanes": VectorTarget.of(target).lanes,
        "target": str(target),
    }


def gpus() -> list[dict[str, Any]]:
    """The CUDA devices that TVM sees: name, architecture, multiprocessors, memory in bytes, driver and its CUDA."""
    import tvm

    from .tuning.device_identity import cuda_version, driver_version, slug_of

    found: list[dict[str, Any]] = []
    while (device := tvm.cuda(len(found))).exist:
        found.append(
            {
                "device": f"cuda:{len(found)}",
                "name": str(device.device_name),
                "slug": slug_of(str(device.device_name)),
                "arch": f"sm_{str(device.compute_version).replace('.', '')}",
                "multiprocessors": int(device.multi_processor_count),
                "memory": int(device.total_global_memory),
                "driver": driver_version(),
                "cuda": cuda_version(),
            }
        )
    return found


def compilers() -> dict[str, str | None]:
    """What was found: ``linker`` links compiled libraries, ``nvcc`` and ``nvrtc`` compile CUDA.

    NVRTC, of the package cuda-bindings, compiles for the GPU at hand; nvcc, if it is there, what is saved.
    """
    from .cuda_compiler import is_there

    try:
        linker: str | None = " ".join(linker_words())
    except DeviceError:
        linker = None
    nvrtc = "of cuda-bindings" if is_there("nvrtc") else None
    return {"linker": linker, "nvcc": shutil.which("nvcc"), "nvrtc": nvrtc}


def linker_words() -> list[str]:
    """The linker's command with its program's whole path. Raises DeviceError if there is none."""
    from .linker import linker_command

    first, *others = linker_command()
    return [shutil.which(first) or first, *others]


def folders() -> dict[str, str]:
    """Where artifacts and tuning logs are kept."""
    from .compile_cache import cache_folder
    from .tuning.log_folders import packaged_logs, user_logs

    return {
        "compiled models": str(cache_folder()),
        "your tuning logs": str(user_logs()),
        "packaged tuning logs": str(packaged_logs()),
    }


def tuning_logs() -> list[dict[str, Any]]:
    """Every log that a compile would look at: its folder, device and number of records, or why it cannot be read."""
    from .errors import LogError
    from .tuning.log_folders import log_folders, log_roots
    from .tuning.log_store import read_log

    found: list[dict[str, Any]] = []
    for folder in (folder for root in log_roots() for folder in log_folders(root)):
        try:
            log = read_log(folder)
        except LogError as error:
            found.append({"folder": str(folder), "problem": str(error)})
            continue
        described = {"slug": log.slug, "arch": log.device["arch"], "records": len(log.entries)}
        found.append({"folder": str(folder)} | described)
    return found


def hints(
    installed: dict[str, str | None],
    processor: dict[str, Any],
    devices: list[dict[str, Any]],
    tools: dict[str, str | None],
    logs: list[dict[str, Any]],
) -> list[Hint]:
    """What will be slow or impossible with what the other functions found, and what to do about it."""
    found = []
    if tools["linker"] is None:
        found.append(Hint("linker", "compiled models cannot be saved without a C++ compiler; install g++ or ziglang"))
    for name, extra, lost in (
        ("torch", "torch", "PyTorch models, Hugging Face directories and .gguf files cannot be imported"),
        ("transformers", "torch", "Hugging Face directories and .gguf files cannot be imported"),
        ("onnx", "onnx", ".onnx files cannot be imported"),
    ):
        if installed[name] is None:
            found.append(Hint(name, f"{lost}; pip install 'rotquant-tvm[{extra}]'"))
    if processor["vector_lanes"] < 16:
        lanes = processor["vector_lanes"]
        found.append(Hint("cpu", f"vectors of {lanes} floats: attention over packed codes was tuned for AVX-512's 16"))
    if not devices:
        found.append(Hint("gpu", "none is visible; name one to compile for it: --target nvidia/nvidia-h100"))
    if devices and tools["nvcc"] is None and tools["nvrtc"] is None:
        found.append(
            Hint("cuda", "no kernels can be compiled for the GPU here: neither nvcc nor cuda-bindings (NVRTC) is there")
        )
    for device in devices:
        if _capability(device) < OLDEST:
            text = f"{device['name']} is {device['arch']}: the fast kernels need sm_{OLDEST}, it has the generic ones"
            found.append(Hint("gpu", text))
        if not any(log.get("slug") == device["slug"] for log in logs):
            found.append(
                Hint("tuning", f"no tuning log of {device['name']}: kernels take their rules' own knobs; see tvmc tune")
            )
    found += [Hint("tuning", log["problem"]) for log in logs if "problem" in log]
    return found


def _capability(device: dict[str, Any]) -> int:
    """10 · major + minor of a GPU."""
    return int("".join(c for c in str(device["arch"]) if c.isdigit()) or 0)
