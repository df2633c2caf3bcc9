"""The parts of a tile, one after the other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A part of a tile: byte offset from the tile's start, and size in bytes."""

    offset: int
    nbytes: int


def sections_in_order(sizes: dict[str, int]) -> dict[str, Section]:
    """Return sections of these sizes in bytes, one after the other."""
    sections, offset = {}, 0
    for name, nbytes in sizes.items():
        sections[name] = Section(offset, nbytes)
        offset += nbytes
    return sections
