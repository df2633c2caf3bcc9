"""The append kernel where there is no GPU: on the simulated one, against the formats' own encoding."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from rotquant_tvm.schedules import append_cuda

from ..ops.cases import Case
from ..ops.test_append import check_append, random_step
from ..ops.test_rings import BATCH, RingedCache
from ..sampling import sampled
from .simulated_append import append_on_few_multiprocessors
from .test_append_cuda import shape_of

CASES = [Case("f16", 64, 2, 1), Case("hurwitz3", 64, 2, 2)]
ROTATED = [Case("hurwitz3", 64, 2, 2), Case("iso4/planar2", 80, 2, 2)]
CHUNKS = ([70, 0, 1], [33, 130, 0], [1, 1, 1], [1, 2, 190])


@pytest.fixture
def rng(request):
    """Random numbers of the test's own."""
    return np.random.default_rng(sum(request.node.name.encode()))


@pytest.mark.parametrize("case", sampled(CASES, []), ids=str)
def test_new_tokens_are_encoded_and_nothing_else_changes(rng, case):
    before, new = [31, 5, 64, 90], [34, 0, 20, 10]
    cache, k, v = random_step(rng, case, new, "float16")
    after = append_on_few_multiprocessors(shape_of(case), case.codecs, cache, (k, v), before, new)
    check_append(case, cache, after, (k, v), before, new)


@pytest.mark.parametrize("new", [[3, 0], [34, 20]], ids=["few", "many"])
def test_many_tiles_take_fewer_warps(rng, new):
    case, before = Case("f16/iso3", 64, 1, 1), [31, 5]
    cache, k, v = random_step(rng, case, new, "float16")
    with patch.multiple(append_cuda, WARPS_OF_MANY=2, TILES_OF_MANY=1):
        after = append_on_few_multiprocessors(shape_of(case), case.codecs, cache, (k, v), before, new)
    check_append(case, cache, after, (k, v), before, new)


@pytest.mark.parametrize("case", sampled(ROTATED, ROTATED[:1]), ids=str)
def test_one_token_each(rng, case):
    """Tiles are asked for before the lengths are known for sure: also beyond the last one, and where nothing is new."""
    before, new = [0, 31, 32, 95, 96, 500, 40, 0], [1, 1, 1, 1, 1, 1, 0, 0]
    cache, k, v = random_step(rng, case, new, "float16")
    after = append_on_few_multiprocessors(shape_of(case), case.codecs, cache, (k, v), before, new)
    check_append(case, cache, after, (k, v), before, new)


def test_one_token_finds_no_place_in_a_cache_without_tiles(rng):
    case, counts = Case("hurwitz3", 64, 2, 2), [1, 1]
    cache, k, v = random_step(rng, case, counts, "float16")
    nothing = cache[:, :, :0]
    assert append_on_few_multiprocessors(shape_of(case), case.codecs, nothing, (k, v), [0, 31], counts).size == 0


class SimulatedRing(RingedCache):
    """A ring that the kernel for GPUs appends to."""

    def append(self, new, counts, after=0):
        counts, case = np.asarray(counts, np.int32), self.case
        self.lengths = self.lengths + counts
        seen = [np.zeros((BATCH, new[0].shape[2], after, case.head_dim), self.dtype)] if after else []
        shape = replace(shape_of(case, self.dtype), window=self.ring.window)
        before = self.lengths - counts
        self.cache = append_on_few_multiprocessors(shape, case.codecs, self.cache, new, before, counts, seen)
        self.note(new, counts)


@pytest.mark.parametrize("case", sampled(CASES, CASES[:1]), ids=str)
def test_a_ring_keeps_the_last_tiles(rng, case):
    cache = SimulatedRing(None, rng, case, 20, "float16")
    for number, counts in enumerate(CHUNKS):
        cache.append(cache.draw(max(counts)), counts, after=2 * (number % 2))
        cache.check()
    assert cache.lengths.max() > 2 * cache.ring.tokens
