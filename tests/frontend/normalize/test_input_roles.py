"""Inputs are told by their shapes and readers, under names of any kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tvm
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize import input_roles as roles
from rotquant_tvm.frontend.normalize import normalize_step
from rotquant_tvm.frontend.normalize.step_view import StepView

from . import mask_spellings as masks
from .numpy_step import compare
from .tiny_step import tiny_graph


def found(graph):
    return roles.find_input_roles(graph, StepView(graph.mod["main"]))


def test_roles_and_sizes():
    graph = tiny_graph(mask=masks.given_bool, layers=1)
    result = found(graph)
    assert result.kinds == (roles.IDS, roles.POSITIONS, roles.MASK, roles.PAST, roles.PAST)
    (length,) = {str(size) for var, size in result.sizes.items() if var.name == "t"}
    assert length == "past + seq"


def test_ids_are_told_from_positions_that_look_a_table_up_too():
    graph = tiny_graph(layers=1)
    anonymous = replace(graph, inputs=["a", "position_b", *graph.inputs[2:]])
    assert found(anonymous).kinds[:2] == (roles.IDS, roles.POSITIONS)
    compare(graph, normalize_step(anonymous))


def test_a_model_that_takes_no_ids_is_refused():
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([tvm.tirx.Var("b", "int64"), tvm.tirx.Var("s", "int64"), 8], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(R.negative(x))
        builder.emit_func_output(result)
    graph = replace(tiny_graph(layers=1), mod=builder.get(), inputs=["x"], weights=[], weight_names=[])
    with pytest.raises(ModelError, match="it takes no token ids"):
        normalize_step(graph)


def test_a_fixed_number_of_tokens_is_refused():
    graph = tiny_graph(layers=1, positions="shapes")
    function = graph.mod["main"]
    seq = function.params[0].ty.shape.values[1]
    mod = tvm.IRModule({"main": function.bind_symbolic_vars({seq: tvm.tirx.IntImm("int64", 1)})})
    with pytest.raises(ModelError, match="'input_ids' takes 1 tokens per call and no other number"):
        normalize_step(replace(graph, mod=mod))


def _with_input(name, shape, dtype, read):
    """A step with another input that is added to the hidden states."""

    def extra(step, x):
        return step.emit(R.add(x, read(step, step.inputs[name])))

    def mask(step):
        return masks.causal()(step)

    mask.extra_input = (name, shape, dtype)
    return {"extra": extra, "mask": mask, "layers": 1}


def test_an_input_without_a_role_is_refused_if_it_is_read():
    def read(step, used):
        return step.emit(R.expand_dims(step.emit(R.astype(used, "float32")), 2))

    spelling = _with_input("token_type_ids", lambda step: [step.batch, step.seq], "int64", read)
    with pytest.raises(ModelError, match=r"the input token_type_ids \(other\) is read by relax.astype"):
        normalize_step(tiny_graph(**spelling))


def test_an_input_without_a_role_is_dropped_if_it_is_not_read():
    spelling = _with_input("use_cache_branch", lambda step: [1], "bool", None) | {"extra": None}
    graph = tiny_graph(**spelling)
    assert [param.name for param in normalize_step(graph).mod["main"].params[:5]] == [
        "ids", "positions", "last", "past_k_0", "past_v_0",
    ]  # fmt: skip
