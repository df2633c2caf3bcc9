"""The last layer of a Hurwitz rotation apart from the others: its algebra, who takes it, and whole tiles with it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from rotquant_tvm.schedules.quartet_layer_cuda import QuartetLayer

from rotquant_tvm.formats.quaternion import left_matrix

from ..ops.cases import Case
from ..ops.reference import codec_of
from ..ops.test_append import check_append, random_step
from ..sampling import sampled
from .simulated_append import append_on_few_multiprocessors
from .test_append_cuda import shape_of

CASES = [Case("hurwitz3:ip/hurwitz3", 128, 1, 1), Case("hurwitz1/hurwitz2:ip", 128, 1, 1)]


@pytest.mark.parametrize("signs", list(itertools.product((1.0, -1.0), repeat=4)))
def test_any_quaternion_is_two_butterflies_and_signs(signs):
    matrix = left_matrix(np.array(signs) / 2)
    r = matrix[0]
    odd = -16 * np.prod(r)
    z = np.diag((odd * r[0], -odd * r[1], -r[2], -r[3]))
    low, high, both, apart = z[0] - z[1], z[0] + z[1], z[2] + z[3], z[2] - z[3]
    c = [low - both, high - apart, high + apart, low + both]
    first, second, third = (-4 * odd * r[0] * r[p] for p in (1, 2, 3))
    if odd > 0:
        outputs = [c[0], first * c[1], second * c[2], third * c[3]]
    else:
        outputs = [-c[3], first * c[1], second * c[0], third * c[2]]
    np.testing.assert_array_equal(outputs, matrix)


@pytest.mark.parametrize(
    ("text", "head_dim", "taken"),
    [
        ("hurwitz3", 128, True),
        ("hurwitz3", 64, False),  # a quartet's codes would share a word
        ("hurwitz3", 192, False),
        ("hurwitz3", 256, False),  # the layers before reach further than 16 dims
        ("iso3", 128, False),
        ("turbo3", 128, False),
        ("f16", 128, False),
    ],
)
def test_who_takes_it(text, head_dim, taken):
    assert QuartetLayer.possible(codec_of(text, head_dim)) == taken


@pytest.mark.parametrize("case", sampled(CASES, CASES[:1]), ids=str)
def test_whole_tiles(case):
    """Also vectors of zeros, whose codes are the middle one though others' are complemented, and awkward ones."""
    rng = np.random.default_rng(5)
    before, new = [31, 0], [34, 20]
    cache, k, v = random_step(rng, case, new, "float16")
    k[0, :, 0, 3], v[0, :, 2, 7], k[0, :, 3, 0] = np.inf, -np.inf, np.nan
    k[0, :, 4], v[0, :, 5], k[1, :, 17] = 0, 0, 0
    k[1, :, 9] *= 1e-3
    after = append_on_few_multiprocessors(shape_of(case), case.codecs, cache, (k, v), before, new)
    check_append(case, cache, after, [x.astype(np.float64) for x in (k, v)], before, new, ties=True)
