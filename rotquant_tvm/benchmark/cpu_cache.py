"""How large this CPU's last-level cache is."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

UNKNOWN = 32 << 20
MOST = 128 << 20
"""More than this is shared by more cores than a benchmark runs on; rotating past it would take all memory."""


def last_level_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the size of the largest cache that Linux names for core 0, at most ``MOST``; else a usual one."""
    sizes = []
    for file in folder.glob("index*/size"):
        with suppress(OSError, ValueError):
            text = file.read_text().strip()
            sizes.append(int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1))
    return min(max(sizes), MOST) if sizes else UNKNOWN
