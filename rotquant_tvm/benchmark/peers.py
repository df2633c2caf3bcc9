"""Racing the CUDA kernels of the user's own checkouts of IsoQuant and RotorQuant (``--peers DIR``).

Their sources are compiled where they lie, by nvcc, into libraries in the user's cache folder. Without nvcc, a library
of that name which was built elsewhere is taken from DIR. They launch on their thread's default stream.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rotquant_tvm.compile_cache import cache_folder
from rotquant_tvm.errors import DeviceError, UsageError
from rotquant_tvm.formats import Codebook, Codec

from .contender import Call, Contender
from .device import BenchmarkDevice
from .peer_launcher import LAUNCHER, STAND_IN

FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "--use_fast_math", "--default-stream", "per-thread")
"""What RotorQuant's own tests build with, and a stream of the thread's own, which a graph can capture."""

CHECKED, WORST = 512, 2.0
"""A peer's kernel is right if the distortion of so many vectors is at most so many times the reference's."""

Vectors = Sequence[tuple[Any, Any]]
"""Sets of x and y [n, head_dim], float16 or float32 torch tensors on CUDA."""


@dataclass(frozen=True)
class PeerKernel:
    """One binding: its source file's place in a checkout, its name less the dtype, its arguments and their data."""

    rival: str
    source: str
    binding: str
    kinds: str
    parameters: Callable[[int, np.random.Generator], list[NDArray[np.float32]]]
    codebooks: int = 1
    most_dims: int = 1 << 20


def _units(blocks: int, generator: np.random.Generator) -> NDArray[np.float32]:
    values = generator.standard_normal((blocks, 4))
    units: NDArray[np.float32] = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return units


def _angles(blocks: int, generator: np.random.Generator) -> NDArray[np.float32]:
    angle = generator.uniform(0, 2 * np.pi, blocks)
    return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


_ISO = "isoquant/csrc/isoclinic_fused_kernel.cu"
_FULL = PeerKernel(
    "IsoQuant", _ISO, "isoclinic_full_fused", "tttti", lambda d, g: [_units(-(-d // 4), g), _units(-(-d // 4), g)]
)
_FAST = PeerKernel("IsoQuant", _ISO, "isoclinic_fast_fused", "ttti", lambda d, g: [_units(-(-d // 4), g)])
_PLANAR = PeerKernel(
    "IsoQuant",
    "isoquant/csrc/planar2_fused_kernel.cu",
    "planar2_fused",
    "ttti",
    lambda d, g: [_angles(-(-d // 2), g)],
)
_ROTOR = PeerKernel(
    "RotorQuant",
    "turboquant/csrc/rotor_fused_kernel.cu",
    "rotor_full_fused",
    "tttitititi",
    lambda d, g: [_units(-(-d // 3), g)],
    codebooks=4,  # 2^bits centroids for each of four grades, as its own benchmark has it
    most_dims=3 * 128,  # it keeps 128 blocks in shared memory and writes past them
)
VARIANTS = {"iso": _FAST, "planar": _PLANAR}
"""IsoQuant's kernel of the same variant, by our rotation; the full one is raced by all others."""


class Peers:
    """The kernels found in a folder, built for a device; ``notes`` says which could not be.

    Raises ``UsageError`` if the folder has no source of any of them.
    """

    def __init__(self, folder: Path, device: BenchmarkDevice) -> None:
        self._device, self._folder = device, folder
        self._libraries: dict[str, ctypes.CDLL] = {}
        self.notes: list[str] = []
        sources = {source: find_source(folder, source) for source in (_ISO, _PLANAR.source, _ROTOR.source)}
        found = {source: path for source, path in sources.items() if path is not None}
        if not found:
            raise UsageError(
                f"--peers {folder}: no checkout of ParaMind2025/isoquant or scrya-com/rotorquant; clone one into it"
            )
        for source, path in sources.items():
            if path is None:
                self.notes.append(f"{source} is not in {folder}")
                continue
            try:
                self._libraries[source] = _library(path, folder, str(device.target.attrs["arch"]))
            except (DeviceError, OSError) as error:
                self.notes.append(str(error))

    def contenders(self, rotation: str, codec: Codec, sets: Vectors) -> list[Contender]:
        """The peers' round trips of these vectors: IsoQuant's of the same variant, RotorQuant's where it is valid."""
        kernels = [VARIANTS.get(rotation, _FULL), _ROTOR]
        return [
            Contender(kernel.rival, self._calls(kernel, codec, sets), [y for _, y in sets], default_stream=True)
            for kernel in kernels
            if kernel.source in self._libraries and codec.head_dim <= kernel.most_dims
        ]

    def _calls(self, kernel: PeerKernel, codec: Codec, sets: Vectors) -> list[Call]:
        assert isinstance(codec.codebook, Codebook)
        parameters = kernel.parameters(codec.head_dim, np.random.default_rng(0))
        data = [self._device.native(array) for array in [*parameters, codec.codebook.centroids]]
        tensors = [*data, *[data[-1]] * (kernel.codebooks - 1)]
        numbers = (ctypes.c_int * kernel.codebooks)(*[len(codec.codebook.centroids)] * kernel.codebooks)
        launch = self._libraries[kernel.source].launch
        name = f"{kernel.binding}_{'half' if sets[0][0].element_size() == 2 else 'float'}".encode()

        def call(x: Any, y: Any) -> None:
            pointers = (ctypes.c_void_p * (1 + len(tensors)))(x.data_ptr(), *(t.data_ptr() for t in tensors))
            rows, dim = (ctypes.c_int64(size) for size in x.shape)
            status = launch(name, kernel.kinds.encode(), pointers, numbers, rows, dim, ctypes.c_void_p(y.data_ptr()))
            if status:
                raise DeviceError(f"{kernel.rival}'s {name.decode()} failed with status {status}")

        return [self._first(codec, call, *sets[0]), *(lambda x=x, y=y: call(x, y) for x, y in sets[1:])]

    def _first(self, codec: Codec, call: Callable[[Any, Any], None], x: Any, y: Any) -> Call:
        """The call on the first set, which checks its result when it is run for the first time."""
        checked: list[bool] = []

        def run() -> None:
            call(x, y)
            if not checked:
                checked.append(True)
                self._check(codec, *(self._device.numpy(t, slice(0, CHECKED)).astype(np.float64) for t in (x, y)))

        return run

    def _check(self, codec: Codec, x: NDArray[Any], y: NDArray[Any]) -> None:
        expected, found = (np.square(z - x).sum() for z in (codec.decode(codec.encode(x)), y))
        if not found <= WORST * expected:
            raise DeviceError(
                f"wrong result: distortion {found / len(x):.3g}, the reference has {expected / len(x):.3g}"
            )


def find_source(folder: Path, source: str) -> Path | None:
    """Return where a checkout in ``folder`` (or ``folder`` itself) has a source file, if one does."""
    return next((base / source for base in (folder, *sorted(folder.glob("*"))) if (base / source).is_file()), None)


def _library(source: Path, folder: Path, arch: str) -> ctypes.CDLL:
    """Build a source or find it built; raises ``DeviceError`` if it cannot be."""
    number = arch.removeprefix("sm_")
    flags = [*FLAGS, "-gencode", f"arch=compute_{number},code=sm_{number}"]
    digest = hashlib.sha256("\0".join([source.read_text(), STAND_IN, LAUNCHER, *flags]).encode()).hexdigest()[:16]
    name = f"{source.stem}-{digest}.so"
    built = cache_folder() / "peers" / name
    for path in (folder / name, built):
        if path.is_file():
            return ctypes.CDLL(str(path.resolve()))
    compiler = shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"
    )
    if compiler is None:
        raise DeviceError(
            f"{source.name} was not built: nvcc is not on the PATH, and {folder / name} is not there either"
        )
    work = built.with_suffix(".build")
    (work / "torch").mkdir(parents=True, exist_ok=True)
    (work / "torch" / "extension.h").write_text(STAND_IN)
    (work / "launcher.cu").write_text(LAUNCHER)
    defines = [f"-I{work}", f'-DPEER_SOURCE="{source.resolve()}"']
    command = [compiler, "-shared", "-Xcompiler", "-fPIC", *flags, *defines, str(work / "launcher.cu")]
    done = subprocess.run([*command, "-o", str(work / name)], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        raise DeviceError(f"{source.name} was not built: {lines[0] if lines else 'nvcc failed'}")
    (work / name).replace(built)
    shutil.rmtree(work, ignore_errors=True)
    return ctypes.CDLL(str(built))
