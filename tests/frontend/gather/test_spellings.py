"""Every spelling becomes one attention with the same numbers."""

import numpy as np
import pytest

from rotquant_tvm.frontend.gather import near_misses

from .gathered_case import attentions, gathered, run_both
from .layout_spellings import CASTS, LAYOUTS, REPEATS, SOFTCAPS
from .numpy_runner import run_in_numpy
from .spellings import GUARDS, MASKS, SCALES

GROUPS = {
    "scales": SCALES,
    "masks": MASKS,
    "guards": GUARDS,
    "layouts": LAYOUTS,
    "repeats": REPEATS,
    "softcaps": SOFTCAPS,
    "casts": CASTS,
}
CASES = [(group, name) for group, spellings in GROUPS.items() for name in spellings]


def check_same(name, spelling, before, after):
    tolerance = 1e-5 if spelling.dtype == "float32" else 5e-3
    for left, right in zip(before, after, strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape, name
        np.testing.assert_allclose(right, left, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("group", "name"), CASES)
def test_gathers_one_attention(group, name):
    spelling = GROUPS[group][name]
    before = spelling.mod
    after, found = gathered(before)
    assert [vars(attention) for attention in found] == [
        vars(spelling.expected) | {"scale": pytest.approx(spelling.scale, rel=1e-6)}
    ]
    assert near_misses(before) == []
    numbers = run_in_numpy(before["main"], spelling.arrays())
    capped = [attention.softcap for attention in attentions(after)]
    check_same(name, spelling, numbers, run_in_numpy(after["main"], spelling.arrays(), capped))


@pytest.mark.parametrize(
    "group", ["guards", *(pytest.param(g, marks=pytest.mark.full) for g in GROUPS if g != "guards")]
)
def test_compiled_numbers_are_the_same(group):
    cases = {}
    for name, spelling in GROUPS[group].items():
        before = spelling.mod
        cases[name] = (before, gathered(before)[0], spelling.arrays())
    for name, (before, after) in run_both(cases).items():
        check_same(name, GROUPS[group][name], before, after)
        check_same(name, GROUPS[group][name], before, run_in_numpy(cases[name][0]["main"], cases[name][2]))
