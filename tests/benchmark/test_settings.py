from __future__ import annotations

import pytest

from rotquant_tvm.benchmark.settings import KV_CACHES, OPERATIONS, SHAPES, BatchShape, Settings, count
from rotquant_tvm.errors import UsageError


@pytest.mark.parametrize(
    ("text", "batch", "tokens"), [("8x32K", 8, 32768), ("1x1", 1, 1), ("2 × 1m", 2, 1 << 20), ("3X100", 3, 100)]
)
def test_shapes_are_read(text, batch, tokens):
    assert BatchShape.parse(text) == BatchShape(batch, tokens)


@pytest.mark.parametrize("text", ["", "8", "x8", "0x8", "8x0", "8x32G", "-1x8", "8x1.5K"])
def test_a_shape_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="like 8x32K"):
        BatchShape.parse(text)


def test_the_name_of_a_shape_reads_back():
    for shape in (BatchShape(1, 1000), BatchShape(64, 2048), BatchShape(2, 3 << 20)):
        assert BatchShape.parse(shape.name) == shape
    assert count(32768) == "32K" and count(1 << 20) == "1M" and count(1000) == "1000"


def test_every_operation_has_cases():
    for operation in set(OPERATIONS) - {"roundtrip"}:
        assert KV_CACHES[operation] and SHAPES[operation, "cuda"] and SHAPES[operation, "llvm"]


def test_the_papers_settings_are_the_default():
    settings = Settings("roundtrip")
    papers = [(n, d) for n, d in settings.vector_cases() if n == 8192]
    assert len(papers) * len(settings.bits) * len(settings.dtypes) == 18
    assert settings.vector_cases()[-1] == (1 << 20, 128)


def test_given_vectors_and_dims_are_combined():
    assert Settings("roundtrip", vectors=(5, 7), head_dims=(64,)).vector_cases() == [(5, 64), (7, 64)]
    assert Settings("roundtrip", vectors=(5,)).vector_cases() == [(5, 128), (5, 256), (5, 512)]
    assert Settings("roundtrip", head_dims=(64,)).vector_cases() == [(8192, 64)]


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UsageError, match="no multiple of --kv-heads 3"):
        Settings("decode", heads=8, kv_heads=3)
