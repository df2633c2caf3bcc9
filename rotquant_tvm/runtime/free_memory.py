"""How much memory a device has left, asked before a cache is made: a CPU's system would end the process instead."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tvm.runtime import Device

from rotquant_tvm.errors import DeviceError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

RESERVE = 20
"""One part in so many of what is free is left to everything else."""
_GROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # what control groups say for no limit is about 2^63


def free_bytes(device: Device) -> int | None:
    """Bytes that can still be allocated on ``device``, None if nothing tells.

    On a CPU the least of what the system has available, the process's own limits and its control group's.
    """
    if device.type != "cpu":
        with suppress(Exception):  # a device that is gone, or a runtime that does not know
            free = device.available_global_memory
            return None if free is None else int(free)
        return None
    known = [size for size in (_system(), _process(), _group()) if size is not None]
    return max(0, min(known)) if known else None


def check_room(device: Device, needed: int, what: str, remedy: str) -> None:
    """Raise DeviceError if ``needed`` bytes are not free on a CPU; other devices refuse by themselves."""
    free = free_bytes(device) if device.type == "cpu" else None
    if free is not None and needed > usable(free):
        raise DeviceError(f"{what}: {size_text(needed)} are needed and {size_text(free)} are free; {remedy}")


def usable(free: int) -> int:
    """The part of the free bytes that a cache may take."""
    return free - free // RESERVE


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, 0 if none does; a smaller one fits where a larger one does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def size_text(size: int) -> str:
    """Bytes in words: ``12.9 GiB``."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.1f} {unit}"
    return f"{size} bytes"


def _system() -> int | None:
    with suppress(OSError, ValueError):  # Linux tells it by itself; elsewhere psutil may be there
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    with suppress(Exception):
        import psutil

        return int(psutil.virtual_memory().available)
    return None


def _process() -> int | None:
    if resource is None:
        return None
    with suppress(OSError, ValueError, IndexError):
        pages = [int(number) for number in Path("/proc/self/statm").read_text().split()]
        used = {resource.RLIMIT_AS: pages[0], resource.RLIMIT_DATA: pages[5]}
        limits = {kind: resource.getrlimit(kind)[0] for kind in used}
        left = [limits[kind] - used[kind] * resource.getpagesize() for kind in used if limits[kind] >= 0]
        return min(left) if left else None
    return None


def _group() -> int | None:
    """What the control groups (a container's limits) leave; cached files count as free, as they do for the system."""
    left = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root = _GROUPS / controllers
                place = root / path.lstrip("/")
                left += [_group_free(folder) for folder in (place, *place.parents) if folder.is_relative_to(root)]
    known = [size for size in left if size is not None]
    return min(known) if known else None


def _group_free(folder: Path) -> int | None:
    names = [("memory.max", "memory.current", "inactive_file")]
    names += [("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")]
    for limit, used, files in names:
        with suppress(OSError, ValueError):
            most = int((folder / limit).read_text())  # "max" is no number: no limit
            if most < _UNLIMITED:
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                return most - int((folder / used).read_text()) + int(statistics.get(files, 0))
    return None
