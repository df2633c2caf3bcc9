"""Sentences about an import."""

from __future__ import annotations

from rotquant_tvm.frontend.import_notes import import_notes


def test_notes_assumptions_and_dropped_outputs():
    config = {"notes": ["one branch was taken"], "assumed": ["the mask m is causal"], "dropped_outputs": ["a", "b"]}
    notes = import_notes(config)
    assert notes[:2] == ["one branch was taken", "assumed: the mask m is causal"]
    assert notes[2].endswith("left out: a, b")


def test_a_plain_import_has_none():
    assert import_notes({"layers": [], "assumed": [], "dropped_outputs": []}) == []
