from __future__ import annotations

import pytest
import tvm
from rotquant_tvm.passes.view_reshapes import ViewReshapes
from tvm import relax
from tvm.script import relax as R
from tvm.script import tirx as T

from .simulated_function import calls


@T.prim_func(private=True, s_tir=True)
def kernel(x: T.handle, y: T.handle):
    n = T.int64()
    a = T.match_buffer(x, (n, 4, 8), "float16")
    b = T.match_buffer(y, (n, 4, 8), "float16")
    for i, j, k in T.grid(n, 4, 8):
        with T.sblock("copy"):
            u, v, w = T.axis.remap("SSS", [i, j, k])
            b[u, v, w] = a[u, v, w]


def function(build, shape) -> tvm.IRModule:
    x = relax.Var("x", relax.TensorType(shape, "float16"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x]):
        gvar = bb.add_func(kernel, "kernel")
        with bb.dataflow():
            out = bb.emit_output(build(bb, x, lambda v: bb.emit(relax.call_tir(gvar, [v], v.ty))))
        bb.emit_func_output(out)
    return bb.get()


def after_a_kernel(bb, x, run):
    return R.exp(bb.emit(R.expand_dims(run(x), 0)))


def before_a_kernel(bb, x, run):
    return run(bb.emit(R.squeeze(bb.emit(R.exp(x)), [0])))


def chain(bb, x, run):
    return R.exp(bb.emit(R.squeeze(bb.emit(R.expand_dims(run(x), 1)), [1])))


def between_others(bb, x, _run):
    return R.exp(bb.emit(R.expand_dims(bb.emit(R.exp(x)), 0)))


N = tvm.tirx.Var("n", "int64")


@pytest.mark.parametrize(
    ("build", "shape", "left"),
    [
        (after_a_kernel, (N, 4, 8), ["kernel", "relax.reshape", "relax.exp"]),
        (before_a_kernel, (1, N, 4, 8), ["relax.exp", "relax.reshape", "kernel"]),
        (chain, (N, 4, 8), ["kernel", "relax.reshape", "relax.reshape", "relax.exp"]),
        (between_others, (N, 4, 8), ["relax.exp", "relax.expand_dims", "relax.exp"]),
    ],
    ids=["after", "before", "chain", "between"],
)
def test_beside_kernels_it_is_a_view(build, shape, left):
    assert calls(ViewReshapes()(function(build, shape))["main"]) == left


@pytest.mark.parametrize(
    ("shape", "axes", "view"),
    [
        ((N, 1, 4, 8), [0, 2, 1, 3], True),
        ((N, 4, 1, 8), [0, 2, 1, 3], True),
        ((N, 4, 8, 1), [3, 0, 1, 2], True),
        ((N, 2, 2, 8), [0, 2, 1, 3], False),
        ((1, N, 4, 8), [1, 2, 0, 3], True),
        ((1, N, 4, 8), [2, 1, 0, 3], False),
    ],
)
def test_a_transpose_is_one_if_it_moves_single_axes_alone(shape, axes, view):
    def build(bb, x, run):
        return R.exp(bb.emit(R.permute_dims(bb.emit(R.reshape(run(x), shape)), axes)))

    moved = calls(ViewReshapes()(function(build, (N, 4, 8)))["main"])[2]
    assert moved == ("relax.reshape" if view else "relax.permute_dims")
