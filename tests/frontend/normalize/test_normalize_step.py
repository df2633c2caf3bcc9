"""Whole steps: any combination of spellings, and what the compiler makes of one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm import compile as compile_model
from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize import normalize_step
from rotquant_tvm.frontend.step_graph import SOFTCAPS

from . import mask_spellings as masks
from .numpy_step import SourceRun, compare
from .test_masks import windows
from .tiny_step import VOCAB, tiny_graph


def guarded(step, x):
    """Rows of attention that see no token are 0: never, without padding."""
    emit = step.emit
    real = emit(R.cumsum(step.inputs["attention_mask"], axis=1, dtype="int64"))
    real = emit(R.strided_slice(real, axes=[1], begin=[step.past], end=[step.past + step.seq]))
    seen = emit(R.reshape(emit(R.greater(real, relax.const(0, "int64"))), [step.batch, step.seq, 1]))
    return emit(R.where(seen, x, emit(R.zeros_like(x))))


def test_guards_against_rows_without_a_token_are_settled():
    graph = tiny_graph(mask=masks.padded, extra=guarded)
    imported = normalize_step(graph)
    assert "relax.where" not in {
        value.op.name for value in relax.analysis.get_var2val(imported.mod["main"]).values() if hasattr(value, "op")
    }
    compare(graph, imported)


def test_softcaps_keep_their_order():
    graph = tiny_graph(softcaps=[0.0, 2.5])
    imported = normalize_step(graph)
    assert [float(cap) for cap in imported.mod["main"].attrs[SOFTCAPS]] == [0.0, 2.5]
    compare(graph, imported)


def test_the_source_is_named():
    with pytest.raises(ModelError, match=r"^tiny\.onnx: "):
        normalize_step(tiny_graph(mask=masks.everything, layers=1))


CACHES = ["bhsd", "bshd", "transposed", "merged", "packed", "half", "none"]
MASKS = {"attribute": None, "causal": masks.causal(), "window": masks.window(3), "padded": masks.padded}


@pytest.mark.full
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    cache=st.sampled_from(CACHES),
    mask=st.sampled_from(sorted(MASKS)),
    positions=st.sampled_from(["position_ids", "shapes", "cumsum", "cache_position", "table_slice", "table_prefix"]),
    logits=st.sampled_from(["plain", "merged", "capped", "last"]),
    batch=st.sampled_from([None, 1, 2]),
    dtype=st.sampled_from(["int32", "int64"]),
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    layers=st.integers(1, 3),
)
def test_any_combination_of_spellings(cache, mask, positions, logits, batch, dtype, chunks, layers):
    graph = tiny_graph(
        cache=cache, mask=MASKS[mask], positions=positions, logits=logits, batch=batch, dtype=dtype, layers=layers
    )
    imported = normalize_step(graph)
    assert set(windows(imported)) == {3 if mask == "window" else None}
    compare(graph, imported, batch=batch or 2, chunks=tuple(chunks))


@pytest.mark.full
@pytest.mark.parametrize("cache", ["merged", "none"])
def test_the_compiled_library_computes_what_the_source_does(cache):
    """Through the compiler, with a 16-bit cache: prefill of rows of two lengths in two chunks, and decode."""
    graph = tiny_graph(cache=cache, positions="shapes", mask=masks.window(5))
    session = compile_model(normalize_step(graph), "f16", capacity=32).session(2)
    rng = np.random.default_rng(4)
    rows = [rng.integers(0, VOCAB, 9), rng.integers(0, VOCAB, 6)]
    session.prefill([row[:4] for row in rows])
    logits = session.prefill([row[4:] for row in rows])
    sources = [SourceRun(graph, 1) for _ in rows]
    wanted = [source.step(row[None])[0, -1] for source, row in zip(sources, rows, strict=True)]
    for token in (3, 11, 5, 1):
        np.testing.assert_allclose(np.asarray(logits), wanted, 5e-3, 5e-3)
        logits = session.decode(np.array([token, token]))
        wanted = [source.step(np.array([[token]]))[0, -1] for source in sources]
