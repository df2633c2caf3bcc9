"""Allocating the arrays of a cache, or saying how much room there is and which capacity would fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import tvm_ffi
from tvm.runtime import Device, Tensor
from tvm.runtime.vm import VirtualMachine

from rotquant_tvm.cache_policy import TILE_TOKENS
from rotquant_tvm.errors import DeviceError, RotQuantError
from rotquant_tvm.runtime.cache_info import KVCacheInfo
from rotquant_tvm.runtime.device import forget_cuda_error, reason
from rotquant_tvm.runtime.free_memory import check_room, free_bytes, largest, size_text, usable

Made = TypeVar("Made")


def create_arrays(
    machine: Callable[[], VirtualMachine], info: KVCacheInfo, device: Device, batch: int, capacity: int
) -> list[Tensor]:
    """Call the library's ``create_kv_cache(batch, capacity)`` on a virtual machine that ``machine`` makes.

    Raises DeviceError with the bytes asked for, those that are free and the capacity that would fit. On a CPU that is
    found out before anything is allocated, since systems promise memory that they do not have.
    """
    if device.type == "cpu":
        free = free_bytes(device)
        if free is not None and info.cache_bytes(batch, capacity) > usable(free):
            raise no_room(info, device, batch, capacity)
    try:
        return _tried_twice(lambda: _create(machine, batch, capacity))
    except Exception as error:
        raise no_room(info, device, batch, capacity, reason(error)) from error


def allocated_copy(device: Device, needed: int, what: str, remedy: str, make: Callable[[], Made]) -> Made:
    """Return what ``make`` allocates on ``device`` and fills, ``needed`` bytes.

    Raises DeviceError, which says ``what`` cannot be done, with the bytes asked for and those that are free.
    """
    check_room(device, needed, what, remedy)
    try:
        return _tried_twice(make)
    except RotQuantError:
        raise
    except Exception as error:
        error.with_traceback(None)  # its frames hold what had been allocated
        free = free_bytes(device)
        if free is not None and needed <= free and "memory" not in str(error).lower():
            raise DeviceError(f"{what}: {reason(error)}; {remedy}") from error
        sizes = f"{size_text(needed)} are needed" + ("" if free is None else f" and {size_text(free)} are free")
        raise DeviceError(f"{what}: {sizes} ({reason(error)}); {remedy}") from error


def _tried_twice(make: Callable[[], Made]) -> Made:
    """Call ``make``, and once more without the memory that pools keep and nobody uses."""
    try:
        return make()
    except Exception:
        forget_cuda_error()
        tvm_ffi.get_global_func("vm.builtin.memory_manager.clear")()
    try:
        return make()
    finally:
        forget_cuda_error()


def _create(machine: Callable[[], VirtualMachine], batch: int, capacity: int) -> list[Tensor]:
    return list(machine()["create_kv_cache"](batch, capacity))


def no_room(info: KVCacheInfo, device: Device, batch: int, capacity: int, why: str = "") -> DeviceError:
    """The error for a cache that does not fit ``device``."""
    asked = size_text(info.cache_bytes(batch, capacity))
    said = f"no room on {device}: a KV cache of batch {batch} x capacity {capacity} takes {asked}"
    free = free_bytes(device)
    if free is None:
        return DeviceError(f"{said}{f' ({why})' if why else ''}; use a smaller capacity or batch")
    room = usable(free)
    fitting = largest(lambda tokens: info.cache_bytes(batch, tokens) <= room, capacity - 1)
    fitting -= fitting % TILE_TOKENS if fitting > TILE_TOKENS else 0
    said += f" and {size_text(free)} are free"
    if info.cache_bytes(batch, capacity) <= room:  # refused all the same
        return DeviceError(f"{said} ({why}); use a smaller capacity or batch")
    if not fitting:
        return DeviceError(f"{said}; use a smaller batch")
    return DeviceError(f"{said}: capacity {fitting} would fit; use a smaller capacity or batch")
