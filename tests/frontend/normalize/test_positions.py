"""Positions of every spelling become the parameter, for rows of different lengths too."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize import normalize_step

from . import mask_spellings as masks
from .numpy_step import CanonicalRun, compare
from .tiny_step import ROWS, tiny_graph

SPELLINGS = ["position_ids", "shapes", "cumsum", "cache_position", "table_slice", "table_prefix"]


@pytest.mark.parametrize("positions", SPELLINGS)
def test_positions_become_the_parameter(positions):
    graph = tiny_graph(positions=positions, layers=1)
    imported = normalize_step(graph)
    compare(graph, imported)
    # Learned positions are looked up with an offset of 2 in a table of ROWS.
    assert imported.config["max_position"] == ROWS - 2


@pytest.fixture(scope="module")
def ragged():
    """Logits of rows whose first tokens have different positions, by a model that takes position_ids."""
    return _ragged(normalize_step(tiny_graph(positions="position_ids", layers=1)))


def _ragged(imported):
    run, rng = CanonicalRun(imported, 3), np.random.default_rng(1)
    starts = np.array([[0], [5], [20]])
    chunks = ((0, 4), (4, 3), (7, 1))
    return np.stack([run.step(rng.integers(0, 23, (3, n)), positions=starts + np.arange(k, k + n)) for k, n in chunks])


@pytest.mark.parametrize("positions", [p for p in SPELLINGS if p != "position_ids"])
def test_rows_have_positions_of_their_own(positions, ragged):
    np.testing.assert_allclose(_ragged(normalize_step(tiny_graph(positions=positions, layers=1))), ragged, 2e-4, 2e-4)


@pytest.mark.parametrize("positions", ["shapes", "table_slice", "cache_position"])
def test_a_batch_of_one(positions):
    graph = tiny_graph(positions=positions, batch=1, layers=1)
    imported = normalize_step(graph)
    assert int(imported.mod["main"].params[0].ty.shape[0]) == 1
    compare(graph, imported, batch=1)


def test_the_mask_read_as_numbers_is_refused():
    def extra(step, x):
        mask = step.emit(R.astype(step.inputs["attention_mask"], "float32"))
        return step.emit(R.add(x, step.emit(R.reshape(step.emit(R.sum(mask, axis=1)), [step.batch, 1, 1]))))

    with pytest.raises(ModelError, match=r"the input attention_mask \(padding mask\) is read by relax.astype"):
        normalize_step(tiny_graph(mask=masks.padded, extra=extra, layers=1))


def test_the_length_of_the_past_is_refused_elsewhere():
    def extra(step, x):
        count = step.emit(R.full([1, 1, 1], relax.const(1.0, "float32")))
        ones = step.emit(R.ones([step.past + step.seq, 1], "float32"))
        return step.emit(R.add(x, step.emit(R.multiply(count, step.emit(R.sum(ones))))))

    with pytest.raises(ModelError, match=r"relax.ones .* depends on the past's length"):
        normalize_step(tiny_graph(extra=extra, layers=1))


def test_counting_that_is_no_position_is_refused_without_a_cache():
    def extra(step, x):
        back = step.emit(R.flip(step.emit(R.arange(0, step.seq, 1, "float32")), 0))
        squared = step.emit(R.multiply(back, back))
        return step.emit(R.add(x, step.emit(R.reshape(squared, [1, step.seq, 1]))))

    with pytest.raises(ModelError, match=r"mixes tokens outside of attention .*simulate"):
        normalize_step(tiny_graph(cache="none", positions="shapes", extra=extra, layers=1))


def test_positions_that_end_at_a_number_are_not_taken_for_positions():
    """A clip is no more than the positions below its end: it stays, over the parameter."""

    def extra(step, x):
        clipped = step.emit(R.minimum(step.token_positions(), relax.const(40, "int64")))
        return step.emit(R.add(x, step.emit(R.take(step.w("wpe"), clipped, axis=0))))

    imported = normalize_step(tiny_graph(extra=extra, layers=1))
    calls = relax.analysis.get_var2val(imported.mod["main"]).values()
    assert "relax.minimum" in {call.op.name for call in calls if isinstance(call, relax.Call)}


def test_a_switch_at_a_length_is_refused():
    """As rotary embeddings that change for long texts have it."""

    def extra(step, x):
        total = step.emit(R.arange(step.past + step.seq, step.past + step.seq + 1, 1, "int64"))
        long = step.emit(R.reshape(step.emit(R.greater(total, relax.const(900, "int64"))), [1, 1, 1]))
        return step.emit(R.where(long, step.emit(R.negative(x)), x))

    with pytest.raises(ModelError, match=r"relax.arange .* depends on the past's length"):
        normalize_step(tiny_graph(extra=extra, layers=1))


def test_what_depends_on_the_largest_position_is_refused():
    def extra(step, x):
        largest = step.emit(R.max(step.token_positions(), axis=[1], keepdims=True))
        return step.emit(R.add(x, step.emit(R.expand_dims(step.emit(R.astype(largest, "float32")), 2))))

    with pytest.raises(ModelError, match=r"relax.max .* mixes tokens outside of attention"):
        normalize_step(tiny_graph(extra=extra, layers=1))
