"""A compiled library with its weights on a device, over which any number of sessions run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tvm
from tvm.runtime import Device, Module, Tensor
from tvm.runtime.vm import VirtualMachine

from rotquant_tvm.errors import ArtifactError, DeviceError, UsageError
from rotquant_tvm.runtime.artifact import Artifact, read_artifact
from rotquant_tvm.runtime.cache_allocation import create_arrays
from rotquant_tvm.runtime.cache_arrays import CacheArrays
from rotquant_tvm.runtime.cache_file import library_identity, read_cache_file
from rotquant_tvm.runtime.cache_info import KVCacheInfo
from rotquant_tvm.runtime.device import device_errors, parse_device, reason
from rotquant_tvm.runtime.loaded_modules import load_module
from rotquant_tvm.runtime.session import DEFAULT_CHUNK, Session
from rotquant_tvm.runtime.tokenizer import TextTokenizer

_DEVICE_OF_KIND = {"llvm": "cpu", "c": "cpu"}
_FALLBACK_CAPACITY = 4096


class CompiledLibrary:
    """A loaded library; its weights are shared by all sessions, which may run in threads of their own.

    ``module``: the loaded library, or ``executable.jit()`` right after a compile. ``weights``: arrays in the
    order of ``info.weights``; they are copied to ``device``, but for TVM tensors that are there already.
    ``tokenizer``: None if the model came without one; ``eos_token_ids`` end a generation. ``report``: the compile
    report. ``default_capacity``: tokens per sequence of a session that names none. Raises ArtifactError if library and
    weights do not fit each other, DeviceError if the weights do not fit the device.
    """

    def __init__(
        self,
        module: Module,
        weights: Iterable[np.ndarray | Tensor],
        device: Device,
        *,
        tokenizer: TextTokenizer | None = None,
        eos_token_ids: Sequence[int] = (),
        report: Mapping[str, Any] | None = None,
        default_capacity: int | None = None,
    ) -> None:
        self._module = module
        self.device = device
        info_json = self.virtual_machine()["kv_cache_info"]()
        self.info = KVCacheInfo.from_json(str(info_json), "the library's kv_cache_info")
        with device_errors(f"cannot place the weights on {device}", "use a device with more memory"):
            self.weights: tuple[Tensor, ...] = tuple(_placed(array, device) for array in weights)
        if len(self.weights) != len(self.info.weights):
            raise ArtifactError(
                f"the library takes {len(self.info.weights)} weights and {len(self.weights)} were given; "
                "compile the model again"
            )
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.report = dict(report or {})
        self.default_capacity = min(default_capacity or _FALLBACK_CAPACITY, self.info.max_position)

    def session(
        self, batch: int | None = None, capacity: int | None = None, chunk: int = DEFAULT_CHUNK
    ) -> Session:
        """Start a session with a cache of its own.

        ``batch``: number of sequences, by default the one it was compiled for, else 1; ``capacity``: tokens per
        sequence, by default the artifact's; ``chunk``: most tokens per sequence that one call of prefill
        takes. Raises UsageError for values below 1, a capacity beyond the model's positions and a batch that
        the library was not compiled for, DeviceError if the cache does not fit.
        """
        batch = (self.info.batch or 1) if batch is None else batch
        capacity = self.default_capacity if capacity is None else capacity
        require_positive("chunk", chunk)
        return Session(self, self.create_cache(batch, capacity), int(capacity), int(chunk))

    @property
    def every_logit(self) -> bool:
        """Whether it was compiled with ``every_logit``, so that its sessions can ``verify``."""
        return self.info.every_logit

    def check_every_logit(self) -> None:
        """Raise UsageError unless the library has the logits after every token."""
        if not self.every_logit:
            raise UsageError(
                "the library computes the logits after the last token only; compile the model with every_logit=True "
                "(tvmc compile --every-logit)"
            )

    @cached_property
    def identity(self) -> str:
        """What a saved cache and the library must have in common: SHA-256 (hex) of cache form and weights."""
        return library_identity(self.info.document, self.weights)

    def restore(
        self, path: str | os.PathLike[str], capacity: int | None = None, chunk: int = DEFAULT_CHUNK
    ) -> Session:
        """Start a session that holds what ``Session.save`` wrote to ``path``.

        ``capacity``: tokens per sequence, by default the artifact's or, if that is more, what the file needs: the
        longest sequence's tokens or, after a crop, up to a block more; ``chunk`` as of ``session``. Raises
        ArtifactError for a damaged file or one of another library, DeviceError if the host has no room for a layer,
        UsageError for too small a capacity, and what ``session`` raises.
        """
        try:
            stored = read_cache_file(path, self.identity)
            needed = stored.least_capacity(self.info.policy)
            capacity = max(self.default_capacity, needed) if capacity is None else capacity
            if needed > capacity:
                kept = "" if needed == stored.longest else f", and tiles of tokens cropped since, which need {needed}"
                raise UsageError(
                    f"{path} holds {stored.longest} tokens{kept}; the capacity is {capacity}, use {needed} or more"
                )
            session = self.session(stored.batch, capacity, chunk)
            stored.fill(session.cache)
        except MemoryError as error:
            raise DeviceError(f"no room in the host's memory to restore {path} ({reason(error)}); free some") from error
        return session

    def create_cache(self, batch: int, capacity: int) -> CacheArrays:
        """Allocate an empty cache for ``batch`` sequences of ``capacity`` tokens; raises as ``session``."""
        self.check_batch(batch)
        require_positive("capacity", capacity)
        if capacity > self.info.max_position:
            raise UsageError(
                f"capacity is {capacity} and the model's positions end at {self.info.max_position}; "
                f"use capacity={self.info.max_position} or less"
            )
        tensors = create_arrays(self._allocating_machine, self.info, self.device, int(batch), int(capacity))
        return CacheArrays(tensors, self.device, self.info.policy, self.info.rings)

    def check_batch(self, batch: int) -> None:
        """Raise UsageError unless the library can run ``batch`` sequences at once."""
        require_positive("batch", batch)
        if self.info.max_batch is not None and batch > self.info.max_batch:
            most = self.info.max_batch
            raise UsageError(f"the batch is {batch}; the library's kernels take {most} sequences at once")
        if self.info.batch not in (None, batch):
            raise UsageError(
                f"the model was compiled for a batch of {self.info.batch} and this is one of {batch}; "
                f"use batch={self.info.batch}, or compile it again without a fixed batch in its input shapes"
            )

    def virtual_machine(self) -> VirtualMachine:
        """Return a new virtual machine over the library; one must not be used by two threads at once.

        On CPUs its memory comes from the system and goes back there: a pool would keep a block of every size that a
        call ever took.
        """
        return self._allocating_machine() if self.device.type == "cpu" else VirtualMachine(self._module, self.device)

    def _allocating_machine(self) -> VirtualMachine:
        """A virtual machine whose memory is no pool's."""
        return VirtualMachine(self._module, self.device, memory_cfg="naive")


def _placed(array: Any, device: Device) -> Tensor:
    """The array on the device; what lies there already, compact (a GPU's torch tensor too), is not copied."""
    if hasattr(array, "detach"):  # a torch tensor, which may be a view and may have gradients
        array = array.detach().contiguous()
        array = array.numpy() if array.device.type == "cpu" else tvm.runtime.from_dlpack(array)
    if isinstance(array, Tensor) and array.device == device:
        return array
    return tvm.runtime.tensor(array.numpy() if isinstance(array, Tensor) else array, device)


def require_positive(name: str, value: object) -> None:
    """Raise UsageError unless ``value`` is an integer of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UsageError(f"{name} is {value!r}, expected 1 or more")


def load_library(
    path: str | os.PathLike[str], device: str | None = None, verify: bool = True
) -> CompiledLibrary:
    """Load the artifact at ``path`` onto a device.

    ``device``: ``cpu``, ``cuda``, ``cuda:1`` …; by default the one it was compiled for. ``verify`` checks
    every file's SHA-256 first. Raises ArtifactError for a damaged, incomplete or foreign artifact, UsageError
    for a device it was not compiled for, DeviceError for a device that is absent, and for a CPU or GPU that lacks
    what the code needs.
    """
    artifact = read_artifact(path, verify)
    manifest = artifact.manifest
    place = _device_for(artifact, device)
    if manifest.requires is not None:
        manifest.requires.check_cpu(str(artifact.library_path))
        if place.type == "cuda":
            manifest.requires.check_gpu(place, str(artifact.library_path))
    tokenizer_json = artifact.tokenizer_json()
    library = CompiledLibrary(
        _load_module(artifact),
        (array for _, array in artifact.weights()),
        place,
        tokenizer=None if tokenizer_json is None else TextTokenizer(tokenizer_json, manifest.tokenizer),
        eos_token_ids=manifest.tokenizer.eos_token_ids,
        report=manifest.report,
        default_capacity=manifest.default_capacity,
    )
    if library.info.document != manifest.info.document:
        raise ArtifactError(
            f"{artifact.library_path} is not the library that the manifest describes; compile the model again"
        )
    return library


def load(
    path: str | os.PathLike[str],
    device: str | None = None,
    batch: int | None = None,
    capacity: int | None = None,
    *,
    chunk: int = DEFAULT_CHUNK,
    verify: bool = True,
) -> Session:
    """Load the artifact at ``path`` and start a session.

    Short for ``load_library(path, device, verify).session(batch, capacity, chunk)``; raises what these raise.
    The session's ``library`` makes further sessions over the same weights.
    """
    return load_library(path, device, verify).session(batch, capacity, chunk)


def _device_for(artifact: Artifact, name: str | None) -> Device:
    kind = _target_kind(artifact.manifest.target)
    expected = _DEVICE_OF_KIND.get(kind, kind) if kind else None
    wanted = name or expected or "cpu"
    if expected is not None and wanted.split(":")[0] != expected:
        raise UsageError(
            f"{artifact.path} was compiled for {kind} and cannot run on {wanted!r}; "
            f"load it with device={expected!r} or compile the model for that device"
        )
    return parse_device(wanted)


def _target_kind(target: str | Mapping[str, Any]) -> str | None:
    """Return a target's kind, or None for a tag such as ``nvidia/nvidia-h100``, which does not tell it."""
    if isinstance(target, str) and target.startswith("{"):
        try:
            target = json.loads(target)
        except (ValueError, RecursionError):
            return None
    if isinstance(target, Mapping):
        return str(target["kind"]) if "kind" in target else None
    word = next(iter(target.split()), "")
    return word if re.fullmatch("[a-z]+", word) else None


def _load_module(artifact: Artifact) -> Module:
    try:
        return load_module(artifact.library_path)
    except Exception as error:  # the loader raises several kinds
        why = reason(error)
        remedy = "compile the model here"
        if any(word in why for word in ("failed to map segment", "annot allocate memory")):
            remedy = "free memory, or let code be run from its folder and the one for temporary files"
        raise ArtifactError(f"{artifact.library_path} cannot be loaded on this machine ({why}); {remedy}") from error
