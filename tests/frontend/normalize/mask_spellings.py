"""Masks as models spell them, additive [.., 1, seq, length]; each is a function of a ``TinyStep``."""

from __future__ import annotations

from tvm import relax
from tvm.relax import op as R

from .tiny_step import HIDDEN


def needs(**inputs):
    """Declare the inputs that a mask reads, with the dtype of "mask"."""

    def mark(function):
        function.inputs = inputs
        return function

    return mark


def _const(value, dtype="int64"):
    return relax.const(value, dtype)


def _additive(step, visible):
    zero, hidden = _const(0.0, "float32"), _const(HIDDEN, "float32")
    scores = step.emit(R.where(visible, zero, hidden))
    while scores.ty.ndim < 4:
        scores = step.emit(R.expand_dims(scores, 0 if scores.ty.ndim == 2 else 1))
    return scores


def _grid(step):
    """Positions of queries [s, 1] and keys [1, length]."""
    emit, start = step.emit, step.past if step.cached and not step.static else 0
    if step.static:
        query = emit(R.expand_dims(step.inputs["cache_position"], 1))
    else:
        query = emit(R.expand_dims(emit(R.arange(start, start + step.seq, 1, "int64")), 1))
    return query, emit(R.expand_dims(emit(R.arange(0, step.length, 1, "int64")), 0))


def causal(shift: int = 0):
    """Keys up to the query's position plus ``shift``."""

    def mask(step):
        query, key = _grid(step)
        limit = query if shift == 0 else step.emit(R.add(query, _const(shift)))
        return _additive(step, step.emit(R.less_equal(key, limit)))

    return mask


def window(size: int, both: bool = True):
    """Causal with a window; not ``both``: hides what is after the window's *other* end instead (a wrong mask)."""

    def mask(step):
        query, key = _grid(step)
        near = step.emit(R.greater(key, step.emit(R.subtract(query, _const(size)))))
        visible = step.emit(R.less_equal(key, query)) if both else step.emit(R.less(key, query))
        return _additive(step, step.emit(R.logical_and(near, visible)))

    return mask


@needs(attention_mask=True)
def padded(step):
    """Causal, and not padding."""
    query, key = _grid(step)
    emit = step.emit
    visible = emit(R.expand_dims(emit(R.less_equal(key, query)), 0))
    real = emit(R.expand_dims(emit(R.astype(step.inputs["attention_mask"], "bool")), 1))
    return _additive(step, emit(R.logical_and(visible, real)))


@needs(attention_mask=True)
def padding_alone(step):
    """Every real token, those that come later too."""
    emit = step.emit
    real = emit(R.expand_dims(emit(R.astype(step.inputs["attention_mask"], "bool")), 1))
    real = emit(R.broadcast_to(real, [step.batch, step.seq, step.total]))
    return _additive(step, real)


@needs(mask="bool")
def given_bool(step):
    """The whole mask is an input of booleans."""
    return _additive(step, step.inputs["mask"])


@needs(mask="float32")
def given_float(step):
    """The whole mask is an input of scores."""
    return step.inputs["mask"]


def everything(step):
    """Nothing hidden."""
    return step.emit(R.zeros([1, 1, step.seq, step.length], "float32"))


def prefix(length: int):
    """Causal, and the first tokens see each other."""

    def mask(step):
        query, key = _grid(step)
        emit = step.emit
        first = emit(R.less(key, _const(length)))
        return _additive(step, emit(R.logical_or(first, emit(R.less_equal(key, query)))))

    return mask


def blocks(length: int):
    """Causal within blocks: no token sees another block."""

    def mask(step):
        query, key = _grid(step)
        emit = step.emit
        same = emit(R.equal(emit(R.floor_divide(query, _const(length))), emit(R.floor_divide(key, _const(length)))))
        return _additive(step, emit(R.logical_and(same, emit(R.less_equal(key, query)))))

    return mask


def alibi(step):
    """Causal with a bias that grows with the distance."""
    query, key = _grid(step)
    emit = step.emit
    bias = emit(R.multiply(emit(R.astype(emit(R.subtract(key, query)), "float32")), _const(0.1, "float32")))
    bias = emit(R.reshape(bias, [1, 1, step.seq, step.length]))
    return emit(R.add(causal()(step), bias))


def of_ids(step):
    """Hides tokens by their id."""
    emit = step.emit
    pad = emit(R.equal(step.inputs["input_ids"], _const(0)))
    row = emit(R.where(pad, _const(HIDDEN, "float32"), _const(0.0, "float32")))
    row = emit(R.reshape(row, [step.batch, 1, step.seq, 1]))
    return emit(R.add(causal()(step), row))


def later(size: int, start: int, bound: bool = False):
    """Causal up to a length written in the model, and from there on with a window.

    ``bound``: the length is a variable's value rather than an operand.
    """

    def mask(step):
        query, key = _grid(step)
        emit = step.emit
        near = emit(R.greater(key, emit(R.subtract(query, _const(size)))))
        early = emit(R.less(query, emit(_const(start)) if bound else _const(start)))
        visible = emit(R.logical_and(emit(R.logical_or(near, early)), emit(R.less_equal(key, query))))
        return _additive(step, visible)

    return mask
