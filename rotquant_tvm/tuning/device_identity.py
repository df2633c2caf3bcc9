"""Which device a tuning log is of, and which logs serve a target.

Logs of GPUs are kept by the device's name, those of CPUs by the level of their instruction set.
"""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tvm
from tvm.target import Target
from tvm.target.codegen import target_has_features

X86_LEVELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("x86-64-v4", ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")),
    ("x86-64-v3", ("avx2", "bmi2", "f16c", "fma")),
    ("x86-64-v2", ("sse4.2", "popcnt", "ssse3")),
    ("x86-64", ("sse2",)),
)
"""Levels of the x86-64 ABI, highest first, and features that tell them."""

_ATTRIBUTES = (
    "max_shared_memory_per_block",
    "max_threads_per_block",
    "thread_warp_size",
    "registers_per_block",
    "l2_cache_size_bytes",
    "num-cores",
    "mcpu",
)


@dataclass(frozen=True)
class DeviceIdentity:
    """A device as the manifest of its log describes it.

    slug  the log folder's name. name  as the driver gives it. kind  ``"cuda"`` or ``"llvm"``. arch  ``sm_90a``, or the
    level of a CPU. attributes  of the target. driver, cuda  versions, empty where there are none.
    """

    slug: str
    name: str
    kind: str
    arch: str
    attributes: dict[str, Any] = field(default_factory=dict)
    driver: str = ""
    cuda: str = ""

    @classmethod
    def of(cls, target: Target) -> DeviceIdentity:
        """The device at hand that ``target`` means; for a CPU target the level that it is compiled for."""
        attributes = target_attributes(target)
        if target.kind.name != "cuda":
            level = cpu_levels(target)[0]
            attributes |= {"threads": int(tvm.runtime.num_threads())}
            return cls(f"llvm-{level}", cpu_name() or level, "llvm", level, attributes)
        device = tvm.cuda(0)
        name = str(device.device_name)
        attributes |= {"multiprocessors": int(device.multi_processor_count)}
        return cls(slug_of(name), name, "cuda", arch_of(target), attributes, driver_version(), cuda_version())

    def document(self) -> dict[str, Any]:
        """The identity as JSON data."""
        return asdict(self)


def slug_of(name: str) -> str:
    """A folder's name for a device: ``NVIDIA H100 80GB HBM3`` becomes ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def arch_of(target: Target) -> str:
    """The architecture of a CUDA target."""
    return str(target.attrs.get("arch", ""))


def same_arch(one: str, other: str) -> bool:
    """Whether two CUDA architectures are one, the letter of its own instructions apart (``sm_90`` and ``sm_90a``)."""
    return bool(one) and one.rstrip("af") == other.rstrip("af")


def cpu_levels(target: Target) -> list[str]:
    """The instruction-set levels that a CPU target has, highest first; another architecture is a level of its own."""
    triple = str(target.attrs.get("mtriple", "")) or str(tvm.get_global_func("target.llvm_get_system_triple")())
    if not triple.startswith(("x86_64", "i386", "i686")):
        return [triple.partition("-")[0] or "generic"]
    levels = [
        name for name, features in X86_LEVELS if all(target_has_features(feature, target) for feature in features)
    ]
    return levels or [X86_LEVELS[-1][0]]


def device_slug(target: Target) -> str | None:
    """The slug of the GPU at hand, if a CUDA target could be it."""
    if target.kind.name != "cuda" or not tvm.cuda(0).exist:
        return None
    version = str(tvm.cuda(0).compute_version).replace(".", "")
    return slug_of(str(tvm.cuda(0).device_name)) if same_arch(arch_of(target), f"sm_{version}") else None


def target_attributes(target: Target) -> dict[str, Any]:
    """The attributes of a target that a kernel's speed depends on."""
    attrs = dict(target.attrs.items())
    return {name: _plain(attrs[name]) for name in _ATTRIBUTES if name in attrs}


def cpu_name() -> str:
    """What Linux calls this CPU; empty elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return ""


def driver_version() -> str:
    """The version of the NVIDIA driver; empty where Linux does not say it."""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
        return found[1] if found else ""
    return ""


def cuda_version() -> str:
    """The newest CUDA that the driver can run, ``13.0``; empty without a driver."""
    with suppress(OSError, AttributeError):
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            return f"{version.value // 1000}.{version.value % 1000 // 10}"
    return ""


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, int) else str(value)
