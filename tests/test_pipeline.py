"""Pass hooks, pass names, pass configuration, and errors that cross TVM's pass machinery."""

from __future__ import annotations

import time

import pytest
import rotquant_tvm.passes  # noqa: F401  (registers our exceptions with TVM)
import tvm
from tvm.script import tirx as T

from rotquant_tvm import errors
from rotquant_tvm.pass_hooks import PassHooks, PassTimer
from rotquant_tvm.pipeline import check_pass_names, pass_context, pass_names, run_passes
from rotquant_tvm.target import host_target


@T.prim_func(s_tir=True)
def copy(a: T.Buffer((8,), "float32"), b: T.Buffer((8,), "float32")):
    for i in range(8):
        with T.sblock("copy"):
            v = T.axis.spatial(8, i)
            b[v] = a[v]


@tvm.transform.module_pass(opt_level=0, name="Inner")
class Inner:
    def transform_module(self, mod, _ctx):
        return mod


@tvm.transform.module_pass(opt_level=0, name="Outer")
class Outer:
    def transform_module(self, mod, _ctx):
        return Inner()(Inner()(mod)).with_attr("outer", 1)


def run(hooks, *passes):
    with pass_context(hooks):
        return run_passes(tvm.IRModule({"copy": copy}), passes, host_target())


def test_hooks_surround_every_pass_and_those_inside():
    calls = []
    hooks = PassHooks(lambda name, _: calls.append(f"<{name}"), lambda name, _: calls.append(f"{name}>"))
    run(hooks, Outer(), Inner())
    assert calls == ["<Outer", "<Inner", "Inner>", "<Inner", "Inner>", "Outer>", "<Inner", "Inner>"]


def test_after_hooks_see_what_the_pass_made():
    seen = {}
    run(PassHooks(after=lambda name, mod: seen.setdefault(name, mod)), Outer())
    assert seen["Outer"].attrs["outer"] == 1 and not (seen["Inner"].attrs or {}).get("outer")


def test_disabled_passes_do_not_run():
    names = []
    mod = run(PassHooks(lambda name, _: names.append(name), disabled=["Outer"]), Outer(), Inner())
    assert names == ["Inner"] and not mod.attrs


def test_timed_hooks_call_the_hooks_and_leave_their_time_out():
    calls, timer = [], PassTimer()

    def slow(name, _mod):
        calls.append(name)
        time.sleep(0.05)

    run(PassHooks(slow, slow, disabled=["Inner"]).timed(timer), Outer(), Inner())
    assert calls == ["Outer", "Outer"]
    assert timer.seconds(["Inner", "Outer", "Absent"]) == {"Outer": timer.times[0].seconds}
    assert 0 < timer.times[0].seconds < 0.05


def test_times_nest():
    timer = PassTimer()
    run(PassHooks(timer.before, timer.after), Outer(), Inner())
    outer, inner = timer.times
    assert (outer.name, outer.runs, outer.depth) == ("Outer", 1, 0)
    assert (inner.name, inner.runs, inner.depth) == ("Inner", 3, 0) and outer.seconds > 0 < inner.seconds


@pytest.mark.parametrize("name", ["RotQuantError", "UsageError", "FormatError", "ModelError", "DeviceError"])
def test_our_errors_keep_their_type_through_tvm(name):
    @tvm.transform.module_pass(opt_level=0, name="Fails")
    class Fails:
        def transform_module(self, _mod, _ctx):
            raise getattr(errors, name)("layer 3 is odd")

    with pytest.raises(getattr(errors, name)) as error:
        run(PassHooks(), Fails())
    assert type(error.value).__name__ == name and str(error.value) == "layer 3 is odd"


def test_pass_names_are_checked():
    target = host_target()
    own = pass_names(target)
    assert own.index("QuantizeKVCache") < own.index("HoistRotation") < own.index("FuseTIR")
    check_pass_names([*own, "tirx.VectorizeLoop", "s_tir.LowerInitBlock", "DeadCodeElimination"], target)
    with pytest.raises(errors.UsageError, match="did you mean LowerKVOps") as error:
        check_pass_names(["LowerKvOp"], target)
    assert all(name in str(error.value) for name in own)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"hooks": PassHooks(disabled=["LegalizeOps"])}, "cannot be disabled"),
        ({"opt_level": 4}, "0, 1, 2 or 3"),
        ({"config": {"tirx.disable_vectorise": True}}, "tirx.disable_vectorize"),
        ({"config": {"tirx.disable_vectorize": "perhaps"}}, "bool"),
    ],
)
def test_bad_pass_contexts_are_usage_errors(arguments, fragment):
    with pytest.raises(errors.UsageError, match=fragment):
        pass_context(**{"hooks": PassHooks()} | arguments)


def test_configuration_reaches_the_passes():
    context = pass_context(PassHooks(), 2, {"tirx.disable_vectorize": True})
    assert context.config["tirx.disable_vectorize"] and context.opt_level == 2
