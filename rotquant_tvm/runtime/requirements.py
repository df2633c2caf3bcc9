"""What a machine must have to run a compiled library, and the check of the machine at hand.

Code for instructions that a CPU lacks ends the process without a word, and a GPU's driver speaks of a missing image;
so both are asked before the library is loaded.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm.runtime import Device

from rotquant_tvm.errors import ArtifactError, DeviceError
from rotquant_tvm.runtime.cache_info import entry

CODE_FORMS = ("cubin", "fatbin", "ptx", "cuda")
_ARCH = re.compile(r"sm_(\d+)(\d)([af]?)")


@dataclass(frozen=True)
class Requirements:
    """What a library was compiled for.

    machine  the CPU's kind, ``x86_64`` or ``aarch64`` (``machine_name``). cpu  the name that it was compiled for.
    cpu_features  instruction sets, as Linux spells them in /proc/cpuinfo. cuda_arch  ``sm_90a``, or None for a library
    of a CPU. cuda_code  the form of its kernels, one of ``CODE_FORMS``: "cuda" is source, which is compiled where the
    library is loaded.
    """

    machine: str
    cpu: str = ""
    cpu_features: tuple[str, ...] = ()
    cuda_arch: str | None = None
    cuda_code: str | None = None

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        gpu = None if self.cuda_arch is None else {"arch": self.cuda_arch, "code": self.cuda_code}
        return {
            "machine": self.machine,
            "cpu": {"name": self.cpu, "features": list(self.cpu_features)},
            "cuda": gpu,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any], where: str) -> Requirements:
        """Read ``document()``; raises ArtifactError."""
        cpu = entry(document, "cpu", Mapping, where)
        features = entry(cpu, "features", list, f"{where}: cpu")
        gpu = entry(document, "cuda", Mapping | None, where)
        if not all(isinstance(name, str) for name in features):
            raise ArtifactError(f"{where}: cpu features are no list of names; compile the model again")
        found = cls(entry(document, "machine", str, where), entry(cpu, "name", str, f"{where}: cpu"), tuple(features))
        if gpu is None:
            return found
        arch, code = (entry(gpu, name, str, f"{where}: cuda") for name in ("arch", "code"))
        if not _ARCH.fullmatch(arch) or code not in CODE_FORMS:
            raise ArtifactError(f"{where}: cuda is {dict(gpu)!r}; compile the model again")
        return cls(found.machine, found.cpu, found.cpu_features, arch, code)

    @property
    def text(self) -> str:
        """In words: what device it runs on."""
        cpu = f"{self.machine} CPU" + (f" with {', '.join(self.cpu_features)}" if self.cpu_features else "")
        if self.cuda_arch is None:
            return cpu
        source = "; its kernels are compiled at load, with TVM's compiler and nvcc" if self.cuda_code == "cuda" else ""
        return f"CUDA device of {devices_of(self.cuda_arch, self.cuda_code or '')}, {cpu}{source}"

    def check_cpu(self, where: str) -> None:
        """Raise DeviceError unless this CPU has all that the code needs; ``where`` names the library."""
        if machine_name() != self.machine:
            raise DeviceError(
                f"{where} was compiled for {self.machine} and this is {machine_name()}; compile the model here"
            )
        present = cpu_features()
        missing = [name for name in self.cpu_features if present is not None and name not in present]
        if missing:
            raise DeviceError(
                f"{where} was compiled for a CPU with {', '.join(missing)} ({self.cpu}), which this one lacks; compile "
                "the model here, or for less: --target 'llvm -mcpu=x86-64-v3'"
            )

    def check_gpu(self, device: Device, where: str) -> None:
        """Raise DeviceError unless a CUDA ``device`` runs the kernels."""
        version = str(device.compute_version)
        if not runs_on(self.cuda_arch or "", self.cuda_code or "", version):
            mine = f"sm_{version.replace('.', '')}"
            raise DeviceError(
                f"{where} was compiled for {self.cuda_arch} and {device} is {device.device_name} ({mine}); use a "
                f"device of {devices_of(self.cuda_arch or '', self.cuda_code or '')}, or compile the model with "
                f"--target 'cuda -arch={mine}'"
            )


def machine_name(name: str | None = None) -> str:
    """One spelling for each kind of CPU; by default of the one at hand."""
    found = (name or platform.machine()).lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(found, found)


def cpu_features() -> frozenset[str] | None:
    """What Linux says this CPU has; None elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return frozenset(value.split())
    return None


def runs_on(arch: str, code: str, version: str) -> bool:
    """Whether kernels for ``arch`` in the form ``code`` run on a device of compute capability ``version`` (``9.0``).

    Machine code runs on its own major version, from its minor version on; with the suffix ``a`` on its own version
    alone. What is compiled at load runs on all later ones, too, but with that suffix (``f``: within its major version).
    """
    major, minor, suffix = _parts(arch)
    device = tuple(int(part) for part in version.split(".")[:2])
    if suffix == "a":
        return device == (major, minor)
    if device[0] != major:
        return code in ("ptx", "cuda") and not suffix and device > (major, minor)
    return device >= (major, minor)


def devices_of(arch: str, code: str) -> str:
    """In words, the compute capabilities that kernels run on."""
    major, minor, suffix = _parts(arch)
    if suffix == "a":
        return f"compute capability {major}.{minor}"
    if code in ("ptx", "cuda") and not suffix:
        return f"compute capability {major}.{minor} or later"
    return f"compute capability {major}.{minor} to {major}.9"


def _parts(arch: str) -> tuple[int, int, str]:
    found = _ARCH.fullmatch(arch)
    return (int(found[1]), int(found[2]), found[3]) if found else (0, 0, "")
