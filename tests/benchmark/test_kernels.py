"""The operators that a benchmark compiles: with the knobs of the record for the sizes at hand, or the rule's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rotquant_tvm.schedules.knobs import RECORD_ATTR, chosen_knobs, with_knobs

from rotquant_tvm import codegen
from rotquant_tvm.benchmark.kernels import OperatorLibrary
from rotquant_tvm.ops.site_shape import SiteShape
from rotquant_tvm.target import resolve_target
from rotquant_tvm.tuning.apply_records import with_record
from rotquant_tvm.tuning.record_lookup import TuningRecords
from rotquant_tvm.tuning.shape_buckets import WantedSizes

SHAPE = replace(SiteShape("hurwitz3", "hurwitz3", 32, 8, 128, 128**-0.5, None, "float16"), rotated=True)
SHORT = WantedSizes(batch=1, tokens=1024)


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that are compiled, as the compiler gets them."""
    found = []

    def compile_module(mod, _target):
        found.append(mod["kernel"])
        return {"kernel": lambda *_arguments: None}

    monkeypatch.setattr(codegen, "compile_module", compile_module)
    return found


@pytest.fixture
def library():
    return OperatorLibrary(resolve_target("nvidia/nvidia-h100"))


def test_sizes_choose_the_record(library, compiled):
    """Of short contexts another than of long ones."""
    labels = [library.attention(SHAPE, wanted).label for wanted in (SHORT, WantedSizes(batch=8, tokens=32768))]
    assert all("tuned" in label for label in labels)
    assert [kernel.attrs[RECORD_ATTR].split(":")[0].split(", ")[1] for kernel in compiled] == ["1x1K", "8x32K"]
    assert chosen_knobs(compiled[0])


def test_untuned_kernels_have_the_rules_own_knobs(library, compiled):
    assert "tuned" not in library.attention(SHAPE, SHORT, tuned=False).label
    assert not chosen_knobs(compiled[0]) and RECORD_ATTR not in compiled[0].attrs


def test_so_have_those_whose_record_says_that_they_are_best(library, compiled, monkeypatch):
    """Records of other sizes are not asked in its place."""
    lookup = TuningRecords.lookup

    def own(self, func, wanted=None):
        match = lookup(self, func, wanted)
        return replace(match, knobs={"warps": 4} if wanted is None else {})

    monkeypatch.setattr(TuningRecords, "lookup", own)
    assert "tuned" in library.attention(SHAPE, SHORT).label
    assert not chosen_knobs(compiled[0])


def test_a_record_is_chosen_once():
    """Also one that leaves no knobs behind."""
    target = resolve_target("nvidia/nvidia-h100")
    library = OperatorLibrary(target)
    gvar = library._definitions.attention_packed(SHAPE, 16)
    records = TuningRecords(target)
    once = with_record(library._builder.get()[gvar], records, SHORT)
    bare = with_knobs(once, {})
    assert chosen_knobs(once) and with_record(bare, records, WantedSizes(batch=8, tokens=32768)) is bare
