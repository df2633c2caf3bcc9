"""Heads repeated for grouped queries: taken out in every spelling, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.repeated_heads import without_repeated_heads

from .program_runner import run

B, S, L, KV, COPIES, D = 2, 3, 7, 2, 3, 8
SHAPE = (B, KV, L, D)


def _repeat(emit, x):
    return emit(R.repeat(x, COPIES, 1))


def _expand(emit, x):
    wide = emit(R.broadcast_to(emit(R.expand_dims(x, 2)), [B, KV, COPIES, L, D]))
    return emit(R.reshape(wide, [B, KV * COPIES, L, D]))


def _expand_behind_length(emit, x):
    """[batch, length, heads, head_dim] first, as Llama's own code does."""
    x = emit(R.permute_dims(x, [0, 2, 1, 3]))
    wide = emit(R.broadcast_to(emit(R.expand_dims(x, 3)), [B, L, KV, COPIES, D]))
    return emit(R.permute_dims(emit(R.reshape(wide, [B, L, KV * COPIES, D])), [0, 2, 1, 3]))


def _tile(emit, x):
    """Heads 0, 1, 0, 1, …: neighbouring query heads do not share one."""
    return emit(R.tile(x, [1, COPIES, 1, 1]))


def _others(emit, x):
    """Heads of their own."""
    return emit(R.concat([emit(R.multiply(x, relax.const(float(i), "float32"))) for i in range(COPIES)], axis=1))


def _module(keys, values) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    shapes = {"q": (B, S, KV * COPIES, D), "k": SHAPE, "v": SHAPE, "mask": (1, 1, S, L)}
    q, k, v, mask = params = [relax.Var(n, relax.TensorType(s, "float32")) for n, s in shapes.items()]
    with builder.function("main", params):
        with builder.dataflow():
            made = [spell(builder.emit, x) for spell, x in ((keys, k), (values, v))]
            swapped = [builder.emit(R.permute_dims(x, [0, 2, 1, 3])) for x in made]
            out = builder.emit(R.nn.attention(q, *swapped, bias=mask, scale=0.4))
            result = builder.emit_output(relax.Tuple([out, builder.emit(R.negative(out))]))
        builder.emit_func_output(result)
    return builder.get()


def _heads(mod: tvm.IRModule) -> list[int]:
    """Heads of the keys and of the values of the one attention."""
    for value in relax.analysis.get_var2val(mod["main"]).values():
        if isinstance(value, relax.Call) and getattr(value.op, "name", "").startswith("relax.nn.attention"):
            return [int(operand.ty.shape.values[2]) for operand in value.args[1:3]]
    raise AssertionError("no attention")


def _inputs() -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    shapes = [(B, S, KV * COPIES, D), SHAPE, SHAPE, (1, 1, S, L)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("keys", [_repeat, _expand, _expand_behind_length])
@pytest.mark.parametrize("values", [_repeat, _expand_behind_length])
def test_repetition_is_taken_out_and_the_result_stays(keys, values):
    before = _module(keys, values)
    after = without_repeated_heads(before)
    assert _heads(before) == [KV * COPIES] * 2 and _heads(after) == [KV] * 2
    relax.analysis.well_formed(after)
    for ours, theirs in zip(run(after["main"], _inputs()), run(before["main"], _inputs()), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("keys", "values"), [(_tile, _tile), (_tile, _repeat), (_repeat, _others), (_others, _others)])
def test_heads_that_neighbours_do_not_share_stay(keys, values):
    before = _module(keys, values)
    assert without_repeated_heads(before) is before
