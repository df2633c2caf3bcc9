"""A model without a cache gets one if attention alone mixes its tokens."""

from __future__ import annotations

import pytest
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize import normalize_step

from .numpy_step import compare
from .tiny_step import WIDTH, tiny_graph


def graph(extra):
    return tiny_graph(cache="none", positions="shapes", layers=1, extra=extra)


def gated(step, x):
    """Each token times its own mean, by shapes that change and come back."""
    emit = step.emit
    flat = emit(R.reshape(x, [step.batch * step.seq, WIDTH]))
    mean = emit(R.mean(flat, axis=-1, keepdims=True))
    heads = emit(R.reshape(emit(R.multiply(flat, mean)), [step.batch, step.seq, 4, 6]))
    turned = emit(R.permute_dims(heads, [0, 2, 1, 3]))
    back = emit(R.reshape(emit(R.permute_dims(turned, [0, 2, 1, 3])), [step.batch, step.seq, WIDTH]))
    return emit(R.add(x, back))


def test_tokens_that_keep_to_themselves():
    source = graph(gated)
    compare(source, normalize_step(source))


def shifted(step, x):
    """Every token reads the one before it, as in a short convolution."""
    before = step.emit(R.strided_slice(x, axes=[1], begin=[0], end=[step.seq - 1]))
    zero = step.emit(R.zeros([step.batch, 1, WIDTH], "float32"))
    return step.emit(R.add(x, step.emit(R.reshape(step.emit(R.concat([zero, before], axis=1)), x.ty.shape))))


def averaged(step, x):
    return step.emit(R.add(x, step.emit(R.mean(x, axis=1, keepdims=True))))


def scrambled(step, x):
    """A reshape in the place of a transposition."""
    wrong = step.emit(R.reshape(x, [step.batch, WIDTH, step.seq]))
    return step.emit(R.add(x, step.emit(R.permute_dims(wrong, [0, 2, 1]))))


def mixed_by_a_product(step, x):
    scores = step.emit(R.matmul(x, step.emit(R.permute_dims(x, [0, 2, 1]))))
    return step.emit(R.add(x, step.emit(R.matmul(scores, x))))


def summed(step, x):
    return step.emit(R.cumsum(x, axis=1, dtype="float32"))


def first_token(step, x):
    first = step.emit(R.take(x, relax.const(0, "int64"), axis=1, mode="clip"))
    return step.emit(R.add(x, step.emit(R.expand_dims(first, 1))))


@pytest.mark.parametrize("extra", [shifted, averaged, scrambled, mixed_by_a_product, summed, first_token])
def test_tokens_that_meet_outside_attention(extra):
    with pytest.raises(ModelError, match=r"mixes tokens outside of attention .*simulate"):
        normalize_step(graph(extra))
