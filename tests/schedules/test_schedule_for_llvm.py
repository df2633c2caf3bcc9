from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules.schedule_for_llvm import ScheduleForLLVM
from tvm import relax, tirx
from tvm.script import relax as R
from tvm.script import tirx as T


def legalized(build, *params) -> tvm.IRModule:
    """A fused module of one function; ``build`` emits its body from the parameters."""
    bb = relax.BlockBuilder()
    with bb.function("main", list(params)):
        with bb.dataflow():
            out = bb.emit_output(build(bb, *params))
        bb.emit_func_output(out)
    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    return tvm.transform.Sequential(passes)(bb.get())


def rows(name: str = "x", width: int = 48, dtype: str = "float32") -> relax.Var:
    batch, seq = tirx.Var("batch", "int64"), tirx.Var("seq", "int64")
    return relax.Var(name, relax.TensorType([batch, seq, width], dtype))


def execute(mod, target, *arrays):
    vm = relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())
    return vm["main"](*[tvm.runtime.tensor(a) for a in arrays]).numpy()


def norm(bb, x, weight):
    mean = bb.emit(R.mean(bb.emit(R.power(x, R.const(2.0, "float32"))), axis=[-1], keepdims=True))
    scale = bb.emit(R.rsqrt(bb.emit(R.add(mean, R.const(1e-5, "float32")))))
    return R.multiply(weight, bb.emit(R.multiply(x, scale)))


def rope(bb, x, y):
    low = bb.emit(R.strided_slice(x, axes=[2], begin=[0], end=[24]))
    high = bb.emit(R.strided_slice(x, axes=[2], begin=[24], end=[48]))
    return R.multiply(bb.emit(R.concat([bb.emit(R.negative(high)), low], axis=-1)), y)


def softmax64(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm64(x, w):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w


CASES = {
    "silu": (lambda bb, x: R.nn.silu(x), lambda x: x / (1 + np.exp(-x)), False),
    "gelu": (lambda bb, x: R.nn.gelu_tanh(x), None, False),
    "transpose": (lambda bb, x: R.permute_dims(x, [1, 0, 2]), lambda x: x.transpose(1, 0, 2), False),
    "softmax": (lambda bb, x: R.nn.softmax(x, axis=-1), softmax64, False),
    "sum": (lambda bb, x: R.sum(x, axis=[-1]), lambda x: x.sum(-1), False),
    "max": (lambda bb, x: R.max(x, axis=[-1]), lambda x: x.max(-1), False),
    "norm": (norm, lambda x, w: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w, True),
    "rope": (rope, lambda x, w: np.concatenate([-x[..., 24:], x[..., :24]], -1) * w, True),
    "layer_norm": (
        lambda bb, x, w: R.nn.layer_norm(x, w, bb.emit(R.multiply(w, R.const(0.0, "float32"))), axes=[-1]),
        layer_norm64,
        True,
    ),
}


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 230)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_scheduling_keeps_the_numbers(case, shape, target):
    build, reference, weighted = CASES[case]
    params = [rows(), *([relax.Var("w", relax.TensorType([48], "float32"))] if weighted else [])]
    mod = ScheduleForLLVM(target)(legalized(build, *params))
    relax.analysis.well_formed(mod)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((*shape, 48)).astype("float32")]
    arrays += [rng.standard_normal(48).astype("float32")] if weighted else []
    if reference is None:
        cube = arrays[0].astype("float64")
        expected = cube / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (cube + 0.044715 * cube**3)))
    else:
        expected = reference(*[a.astype("float64") for a in arrays])
    np.testing.assert_allclose(execute(mod, target, *arrays), expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("case", ["silu", "softmax", "sum", "transpose"])
def test_a_width_that_no_vector_divides(case, target):
    build, reference, _ = CASES[case]
    mod = ScheduleForLLVM(target)(legalized(build, rows(width=63)))
    x = np.random.default_rng(0).standard_normal((3, 100, 63)).astype("float32")
    expected = reference(x.astype("float64"))
    np.testing.assert_allclose(execute(mod, target, x), expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("case", CASES)
def test_every_function_is_parallel_and_vectorized(case, target):
    build, _, weighted = CASES[case]
    params = [rows(), *([relax.Var("w", relax.TensorType([48], "float32"))] if weighted else [])]
    mod = ScheduleForLLVM(target)(legalized(build, *params))
    for gvar, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc):
            text = func.script()
            assert func.attrs["tirx.is_scheduled"]
            assert "T.vectorized(" in text, gvar
            symbolic = "batch" in text
            assert ("T.parallel(" in text) == symbolic, gvar  # a [48] tensor is not worth a second thread


def test_symbolic_extents_choose_at_run_time_and_static_ones_at_compile_time(target):
    silu = CASES["silu"][0]
    dynamic = ScheduleForLLVM(target)(legalized(silu, rows()))["silu"].script()
    assert "if batch * seq * T.int64(48) <= " in dynamic
    for extent, threads in ((64, False), (4096, True)):
        static = relax.Var("x", relax.TensorType([extent, 48], "float32"))
        text = ScheduleForLLVM(target)(legalized(silu, static))["silu"].script()
        assert ("T.parallel(" in text) == threads
        assert "if " not in text


def test_a_softmax_computes_each_exponential_once(target):
    text = ScheduleForLLVM(target)(legalized(CASES["softmax"][0], rows()))["softmax"].script()
    assert text.count("T.reinterpret") == 2 * 2  # two factors 2^n, in the serial and in the parallel version
    assert "T.exp(" not in text


def test_reshapes_become_views(target):
    def body(bb, x):
        batch, seq, _ = x.ty.shape
        split = bb.emit(R.reshape(bb.emit(R.add(x, x)), (batch, seq, 4, 12)))
        return R.sum(split, axis=[-1])

    mod = ScheduleForLLVM(target)(legalized(body, rows()))
    assert "R.reshape(" in mod["main"].script()
    x = np.random.default_rng(0).standard_normal((3, 5, 48)).astype("float32")
    expected = (x + x).reshape(3, 5, 4, 12).sum(-1)
    np.testing.assert_allclose(execute(mod, target, x), expected, rtol=1e-5, atol=1e-5)


def test_a_scheduled_function_is_left_alone(target):
    mod = ScheduleForLLVM(target)(
        legalized(CASES["norm"][0], rows(), relax.Var("w", relax.TensorType([48], "float32")))
    )
    tvm.ir.assert_structural_equal(ScheduleForLLVM(target)(mod), mod)


def test_the_current_target_is_the_default(target):
    mod = legalized(CASES["silu"][0], rows())
    with target:
        default = ScheduleForLLVM()(mod)
    tvm.ir.assert_structural_equal(default, ScheduleForLLVM(target)(mod))


def test_a_function_without_blocks_keeps_its_loops(target):
    @T.prim_func(private=True, s_tir=True)
    def opaque(x: T.Buffer((8,), "float32"), y: T.Buffer((8,), "float32")):
        for i in range(8):
            y[7 - i] = x[i]

    after = ScheduleForLLVM(target)(tvm.IRModule({"opaque": opaque}))["opaque"]
    tvm.ir.assert_structural_equal(after.body, opaque.body)
