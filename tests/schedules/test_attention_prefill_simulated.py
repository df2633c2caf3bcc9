"""The tensor-core prefill kernel where there is no GPU: on the simulated one, against float64 attention."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.attention_prefill_cuda import prefill_kernel

from rotquant_tvm.cache_policy import CachePolicy

from ..ops.cases import Case
from ..ops.conftest import Kernels
from .cuda_targets import target_of
from .prefill_problems import check_output, segmented, straight
from .simulated_prefill import PrefillGPU

STEPS = [(0, 5), (40, 3), (0, 0), (33, 40)]
ROTATED = [
    (Case("hurwitz3", 64, 4, 2), None, {}),
    (Case("iso4/planar2", 80, 5, 5), None, {"tokens": 64, "stages": 1}),
    (Case("hurwitz3/q8_0", 96, 4, 2), None, {}),
    (Case("f16/turbo2", 128, 3, 1), None, {"warps": 2}),
    (Case("dense2/hurwitz4", 128, 4, 1), 20, {"warps": 2, "row_tiles": 1, "tokens": 32, "stages": 1}),
    (Case("hurwitz3", 128, 8, 2), 36, {}),
    (Case("iso3", 256, 2, 1), None, {}),
    (Case("rotor3", 112, 2, 1), None, {}),
]
SEGMENTED = [
    (Case("hurwitz3", 64, 2, 1), CachePolicy(sinks=4, recent=32, center=32), None, True),
    (Case("iso3", 128, 4, 2), CachePolicy(sinks=4, recent=64, center=64), None, True),
    (Case("hurwitz2/planar4", 80, 3, 3), CachePolicy(sinks=5, center=32), 50, True),
    (Case("q8_0/hurwitz3", 96, 2, 1), CachePolicy(recent=9), None, True),
    (Case("hurwitz3", 64, 2, 1), CachePolicy(sinks=40, recent=3), 70, False),
    (Case("q8_0", 64, 2, 1), CachePolicy(sinks=40), None, False),
]
APPENDED = ([70, 0, 3], [30, 0, 1])


@pytest.fixture
def rng(request):
    """Random numbers of the test's own."""
    return np.random.default_rng(sum(request.node.name.encode()))


def simulate(problem, knobs=None):
    """Run on a poisoned output and compare."""
    kernel = prefill_kernel(problem.shape, target_of("sm_90a"), **(knobs or {}))
    output = np.full_like(problem.arguments[0], np.nan)
    PrefillGPU(kernel)(*problem.arguments, output)
    check_output(output, problem.wanted, problem.explain)
    assert (output[(problem.wanted == 0).all(axis=(2, 3))] == 0).all()


@pytest.mark.full
@pytest.mark.parametrize("case", [Case("hurwitz3", 64, 4, 2), Case("q4_0/f16", 80, 3, 1)], ids=str)
def test_one_basis(rng, case):
    simulate(straight(rng, case, STEPS))


@pytest.mark.full
@pytest.mark.parametrize("case", ROTATED, ids=str)
def test_changes_of_basis(rng, case):
    case, window, knobs = case
    simulate(straight(rng, case, STEPS, window, rotated=True), knobs)


@pytest.mark.full
@pytest.mark.parametrize(("case", "policy", "window", "rotated"), SEGMENTED, ids=str)
def test_policies(rng, case, policy, window, rotated):
    problem = segmented(Kernels("llvm"), rng, case, policy, APPENDED, [5, 40, 9], window, rotated)
    simulate(problem)


def test_a_past_in_one_sequence_of_two(rng):
    simulate(straight(rng, Case("hurwitz3", 64, 2, 1), [(40, 3), (0, 5)], rotated=True))


@pytest.mark.parametrize(
    ("case", "knobs"),
    [
        (Case("iso3/hurwitz3", 80, 2, 1), {"tokens": 64, "stages": 1}),
        (Case("rotor3/f16", 112, 2, 1), {"tokens": 32, "stages": 1}),
        (Case("turbo3/f16", 128, 2, 1), {}),
    ],
    ids=str,
)
def test_both_terms_of_a_matrix_count(rng, case, knobs):
    """Also where neither ends with the rows that fit at a time: the large one may as well come second."""
    problem = straight(rng, case, [(40, 3)], rotated=True)
    matrix = problem.arguments[6]
    assert len(matrix) == 2 * case.head_dim
    matrix[:] = np.roll(matrix, case.head_dim, 0)
    simulate(problem, knobs)


def test_a_first_chunk_reads_no_matrix(rng):
    problem = straight(rng, Case("hurwitz3", 64, 2, 1), [(0, 33), (0, 0)], rotated=True)
    problem.arguments[-2][:], problem.arguments[-1][:] = np.nan, np.nan
    simulate(problem)
