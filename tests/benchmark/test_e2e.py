"""What of the end-to-end benchmark needs no GPU: its model, its rows and its bookkeeping."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from rotquant_tvm.benchmark import e2e
from rotquant_tvm.benchmark.e2e_model import BenchmarkModel, ModelShape
from rotquant_tvm.benchmark.e2e_step import FREE_BYTES, largest_batch
from rotquant_tvm.benchmark.settings import Settings
from rotquant_tvm.errors import FormatError, UsageError

pytest.importorskip("torch")
pytest.importorskip("transformers")
TINY = ModelShape(2, 64, 4, 2, 16, 128, 97, 512)


class _Library:
    def __init__(self, per_sequence):
        self.info = self
        self.cache_bytes = lambda batch, tokens: batch * tokens * per_sequence


def test_it_is_the_shape_of_an_8b_model():
    import torch

    weights = {"embedding": 128256 * 4096, "head": 128256 * 4096}
    model = BenchmarkModel.__new__(BenchmarkModel)
    model.shape = ModelShape()
    config = model.shape.config()
    assert (config.num_hidden_layers, config.head_dim, config.num_key_value_heads) == (32, 128, 8)
    layer = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (4096,), (4096,)]
    shapes = [(128256, 4096), *layer * 32, (4096,), (128256, 4096)]
    model.weights = [torch.empty(shape, dtype=torch.float16, device="meta") for shape in shapes]
    assert model.weight_bytes == pytest.approx(16.06e9, rel=1e-3)
    assert model.step_bytes(3) == model.weight_bytes - 2 * weights["embedding"] + 3 * 8192
    assert model.flops(1, 1) == 2 * (sum(np.prod(shape) for shape in shapes[1:] if len(shape) == 2))


def test_only_cuda_is_measured():
    with pytest.raises(UsageError, match="CUDA"):
        e2e.run(Settings("e2e", target="llvm"))


def test_rows_are_compared_with_our_16_bit_cache_and_torch():
    seconds = {"torch": 2.0, "f16": 1.6, "hurwitz3": 0.8}
    seconds |= {"broken": ValueError("no\nsuch thing"), "full": e2e.NoRoom("x")}
    rows = {row.subject: row for row in e2e._rows("case", seconds, {"f16": 100, "hurwitz3": 20})}
    assert list(rows) == ["f16", "hurwitz3", "broken", "full"]
    assert [(rival.name, rows["hurwitz3"].ratio(rival)) for rival in rows["hurwitz3"].rivals] == [
        ("our f16", 2.0),
        ("torch", 2.5),
    ]
    assert [rival.name for rival in rows["f16"].rivals] == ["torch"]
    assert rows["hurwitz3"].nbytes == 20 and rows["hurwitz3"].bound == "read" and rows["hurwitz3"].passed
    assert not rows["broken"].passed and "such thing" in rows["broken"].note
    assert rows["full"].passed and rows["full"].seconds is None


def test_a_refused_format_is_no_failure():
    (row,) = e2e._rows("case", {"torch": 1.0, "f16": FormatError("no such format")}, {})
    assert row.refused and row.note == "no such format"


def test_the_largest_batch_leaves_room():
    assert largest_batch(_Library(1000), 1000, FREE_BYTES + 2_500_000) == 2
    assert largest_batch(_Library(1000), 1000, 1000) == 0


def test_one_failure_is_an_entry(monkeypatch):
    monkeypatch.setattr(e2e, "_collect", lambda: None)
    error = ValueError("broken")

    def fail():
        raise error

    assert e2e._attempt(fail) is error and e2e._attempt(lambda: 3) == 3


def test_fewer_sequences_are_tried_where_activations_do_not_fit(monkeypatch):
    """What a failed try held is gone before the next one."""
    monkeypatch.setattr(e2e, "_collect", gc.collect)
    held = weakref.WeakSet()

    def step(size):
        assert not held
        cache = _Library(size)
        held.add(cache)
        if size > 92:
            raise ValueError(f"{size} are too many")

    assert e2e._largest_that_runs(100, step) == "90 ran"
    assert e2e._largest_that_runs(92, step) == "ran"
    assert e2e._largest_that_runs(0, step) == "no room"
    assert e2e._largest_that_runs(94, step) == "90 ran" and e2e._largest_that_runs(3, step) == "ran"
    sizes = []
    e2e._largest_that_runs(3, lambda size: sizes.append(size) or step(93))
    assert sizes == [3, 2, 1]
    assert "800 are too many" in e2e._largest_that_runs(1000, step)
