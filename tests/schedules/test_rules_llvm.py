"""Which rule takes which function, and what is inlined on the way."""

from __future__ import annotations

from rotquant_tvm.schedules.elementwise_llvm import Elementwise
from rotquant_tvm.schedules.inline_producers import inline_producers
from rotquant_tvm.schedules.row_reduction_llvm import RowReduction
from tvm import s_tir, te, tirx, topi
from tvm.target import Target

LLVM = Target({"kind": "llvm", "mcpu": "x86-64-v3"})


def function(build, *shapes):
    """A PrimFunc over placeholders of the given shapes."""
    inputs = [te.placeholder(shape, "float32", name=f"x{i}") for i, shape in enumerate(shapes)]
    return te.create_prim_func([*inputs, build(*inputs)])


def remaining(func) -> list[str]:
    return [info.name for info in inline_producers(s_tir.Schedule(func))]


def test_cheap_producers_are_inlined_even_into_several_readers():
    func = function(lambda x: (lambda y: topi.add(topi.transpose(y), y))(topi.add(x, x)), (8, 8))
    assert len(remaining(func)) == 1


def test_an_exp_with_two_readers_stays():
    def build(x):
        e = topi.exp(x)
        return topi.add(e, topi.transpose(e))

    assert len(remaining(function(build, (8, 8)))) == 2


def test_an_exp_with_one_reader_of_its_size_is_inlined():
    assert len(remaining(function(lambda x: topi.add(topi.exp(x), x), (8, 8)))) == 1


def test_a_division_per_row_is_not_repeated_per_element():
    def build(x, row):
        return topi.multiply(x, topi.divide(tirx.const(1.0, "float32"), row))

    assert len(remaining(function(build, (8, 64), (8, 1)))) == 2


def test_rules_decline_what_is_not_theirs():
    silu = function(lambda x: topi.multiply(x, topi.sigmoid(x)), (4, 64))
    total = function(lambda x: topi.sum(x, axis=1), (4, 64))
    assert isinstance(Elementwise().apply(silu, LLVM), s_tir.Schedule)
    assert RowReduction().apply(silu, LLVM) is None
    assert Elementwise().apply(total, LLVM) is None
    assert isinstance(RowReduction().apply(total, LLVM), s_tir.Schedule)


def test_a_reduction_keeps_a_vector_of_partial_results():
    text = RowReduction().apply(function(lambda x: topi.max(x, axis=1), (4, 64)), LLVM).mod["main"].script()
    assert (
        "T.parallel(" in text and text.count("T.vectorized(T.int64(8))") + text.count("T.vectorized(8)") == 2
    )


def test_a_row_of_odd_length_is_left_to_llvm():
    for build, rule in ((topi.exp, Elementwise()), (lambda x: topi.sum(x, axis=1), RowReduction())):
        text = rule.apply(function(build, (4, 63)), LLVM).mod["main"].script()
        assert "T.parallel(" in text and "T.vectorized(" not in text
