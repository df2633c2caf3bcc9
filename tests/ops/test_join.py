"""Join: a result in place, behind arrays that nothing else reads."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from rotquant_tvm import ops
from rotquant_tvm.ops import Axes


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nothing_changes(kernels, rng, dtype):
    """Neither the result nor the arrays that it waits for, of whatever ranks and dtypes."""
    result = rng.standard_normal((3, 7)).astype(dtype)
    others = [rng.standard_normal((2, 3, 4)).astype(np.float16), np.arange(5, dtype=np.uint32)]
    kernel = kernels.build(ops.join, (2, dtype), ((3, "float16"), (1, "uint32")))
    np.testing.assert_array_equal(kernels.run(kernel, result, *others, writes=(0,)), result)


def test_one_array_and_many(kernels, rng):
    for count in (1, 9):
        result = rng.standard_normal((1, 1, 5)).astype(np.float32)
        others = [rng.standard_normal((2, 1, 2, 3, 4)).astype(np.float16) for _ in range(count)]
        kernel = kernels.build(ops.join, (3, "float32"), ((5, "float16"),) * count)
        np.testing.assert_array_equal(kernels.run(kernel, result, *others, writes=(0,)), result)


@pytest.mark.parametrize("joined", [True, False])
def test_it_keeps_an_update_that_nobody_reads(joined):
    """Dead code elimination drops calls whose results are not taken; join takes them."""
    axes = Axes.of(tvm.target.Target("llvm"))
    bb = relax.BlockBuilder()
    counts = relax.TensorType([4], "int32")
    lengths, new, x = (relax.Var(n, counts) for n in ("lengths", "new", "x"))

    def call(build, *arguments):
        kernel = bb.add_func(build.without_attr("global_symbol"), "kernel")
        return bb.emit(relax.op.call_tir_inplace(kernel, relax.Tuple(list(arguments)), 0, counts))

    with bb.function("main", [lengths, new, x]):
        with bb.dataflow():
            updated = call(ops.advance(axes), lengths, new)
            result = bb.emit(relax.op.add(x, x))
            if joined:
                result = call(ops.join((1, "int32"), ((1, "int32"),), axes), result, updated)
            output = bb.emit_output(result)
        bb.emit_func_output(output)
    mod = relax.transform.DeadCodeElimination(["main"])(bb.finalize())
    vm = relax.VirtualMachine(tvm.compile(mod, "llvm"), tvm.cpu())
    tensors = [tvm.runtime.tensor(np.full(4, n, np.int32)) for n in (5, 2, 3)]
    assert vm["main"](*tensors).numpy().tolist() == [6] * 4
    assert tensors[0].numpy().tolist() == ([7] if joined else [5]) * 4
