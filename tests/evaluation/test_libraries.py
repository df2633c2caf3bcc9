"""Libraries of an evaluation: how they are compiled, that they are loaded once, and that weights are shared."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rotquant_tvm.errors import FormatError
from rotquant_tvm.evaluation import libraries
from rotquant_tvm.evaluation.libraries import BASELINE, Candidate, Libraries, bits_by_length
from rotquant_tvm.report import LENGTHS, true_bits

from ..test_report import info


@pytest.fixture
def compiled(monkeypatch):
    """Replace the compile cache and the loader; returns the list of what was compiled."""
    done = []

    class FakeCache:
        def __init__(self, keep):
            self.keep = keep

        def artifact(self, model, config, target, *, dtype, every_logit, progress):
            progress("compile")
            done.append((model, config.name, config.quantize_chunk, target, dtype, every_logit))
            return SimpleNamespace(path=f"{config.name} {every_logit}")

    def read_artifact(path, verify):
        digest = "other" if path.startswith("iso2") else "same"
        return SimpleNamespace(manifest=SimpleNamespace(files={"weights.safetensors": SimpleNamespace(sha256=digest)}))

    monkeypatch.setattr(libraries, "CompileCache", FakeCache)
    monkeypatch.setattr(libraries, "read_artifact", read_artifact)
    monkeypatch.setattr(
        libraries, "load_library", lambda path, verify: SimpleNamespace(path=path, weights=(object(),), report={})
    )
    return done


def test_libraries_are_compiled_as_the_protocol_needs_and_loaded_once(compiled):
    steps = []
    found = Libraries("model", "llvm", "float16", steps.append)
    ordinary = found.load(Candidate.parse("iso3"))
    special = found.load(Candidate.parse("iso3"), every_logit=True, quantize_chunk=True)
    assert ordinary is not special and found.load(Candidate.parse(" iso3")) is ordinary
    assert compiled == [
        ("model", "iso3", False, "llvm", "float16", False),
        ("model", "iso3", True, "llvm", "float16", True),
    ]
    assert steps == ["iso3: compile", "iso3: load"] * 2


def test_equal_weights_are_held_once(compiled):
    found = Libraries("model")
    first, second, other = (found.load(Candidate.parse(text)) for text in ("iso3", "iso4", "iso2"))
    assert first.weights is second.weights and other.weights is not first.weights


def test_candidates_are_told_apart_by_all_that_matters():
    texts = [("iso3", None), ("iso3,sinks=4", None), ("iso3", "0=f16"), ("iso3/f16", None)]
    assert len({str(Candidate.parse(*text).key()) for text in texts}) == 4
    assert Candidate.parse("iso3", "-1=f16").key()["kv_layers"] == {"-1": "f16"}
    assert Candidate.parse(" f16 ").key() == BASELINE.key() and Candidate.parse(" f16 ").label == "f16"
    assert Candidate.parse("iso3", "0=f16").label == "iso3 [0=f16]"
    with pytest.raises(FormatError):
        Candidate.parse("iso33")


def test_bits_by_length_are_the_reports():
    document = info(("hurwitz3", 64, 3))
    document["layers"][0]["policy"] = {"sinks": 4, "recent": 8, "center": 64, "defer": 0}
    found = bits_by_length(SimpleNamespace(info=SimpleNamespace(document=document)))
    assert found == {str(n): true_bits(document, n) for n in LENGTHS} and found["1024"] > found["8192"] > 3.25
