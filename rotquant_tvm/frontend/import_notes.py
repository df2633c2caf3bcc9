"""What an importer decided by itself and a user should know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def import_notes(config: Mapping[str, Any]) -> list[str]:
    """Sentences about an import, from the ``config`` of an ImportedModel or a StepGraph."""
    notes = [str(note) for note in config.get("notes", ())]
    notes += [f"assumed: {assumption}" for assumption in config.get("assumed", ())]
    if dropped := [str(name) for name in config.get("dropped_outputs", ())]:
        notes.append(f"outputs that a session does not need were left out: {', '.join(dropped)}")
    return notes
