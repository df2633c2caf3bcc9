"""Tidying a program: nested graphs inlined, writes made outputs, names and numbers kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.torch_program import program_step
from rotquant_tvm.frontend.torch_program_tidy import tidied

from .program_runner import run_step


class _Counter(nn.Module):
    """Writes to a buffer, to an alias of it and to a tensor that it made itself."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        before = self.total * 1
        alias = self.total.to(torch.float32)
        alias.add_(x)
        y = x * 2
        y.mul_(self.total)
        self.total.copy_(self.total + 1)
        return before, y, self.total * 3


class _WritesThroughView(_Counter):
    def forward(self, x):
        self.total[1:].add_(x[1:])
        return (self.total * 2,)


class _Lifted(nn.Module):
    """Its state is a plain attribute, which an export lifts as a constant."""

    def __init__(self):
        super().__init__()
        self.plain = [torch.ones(3)]

    def forward(self, x):
        with torch.no_grad():
            y = x.sin()
        self.plain[0].add_(y)
        return self.plain[0] + x


def _export(module, x):
    with torch.no_grad():
        return torch.export.export(module, (x,), strict=False)


@pytest.mark.parametrize("module", [_Counter(), _WritesThroughView()])
def test_writes_become_outputs_and_are_read_afterwards(module):
    x = torch.tensor([1.0, 2.0, 3.0])
    graph = program_step(_export(module, x), "a module")
    assert graph.inputs == ["x", "total"] and graph.outputs[-1] == "total"
    state = np.array([5.0, 6.0, 7.0], np.float32)
    module.total.copy_(torch.from_numpy(state))
    expected = [*(value.clone() for value in module(x)), module.total]
    outputs = run_step(graph, x=x.numpy(), total=state)
    for ours, theirs in zip(outputs.values(), expected, strict=True):
        np.testing.assert_allclose(ours, theirs)


def test_a_constant_that_is_written_is_state():
    program = tidied(_export(_Lifted(), torch.zeros(3)), "a module")
    kinds = [spec.kind for spec in program.graph_signature.input_specs]
    assert InputKind.CONSTANT_TENSOR not in kinds and InputKind.BUFFER in kinds
    assert program.graph_signature.output_specs[0].kind is OutputKind.BUFFER_MUTATION
    graph = program_step(_export(_Lifted(), torch.zeros(3)), "a module")
    state = next(name for name in graph.inputs if name != "x")
    x = np.array([0.1, 0.2, 0.3], np.float32)
    outputs = run_step(graph, x=x, **{state.replace(".", "__"): np.full(3, 2.0, np.float32)})
    np.testing.assert_allclose(outputs[state], 2 + np.sin(x), rtol=1e-6)
    np.testing.assert_allclose(outputs[graph.outputs[0]], 2 + np.sin(x) + x, rtol=1e-6)


def test_gradient_switches_are_inlined_and_autocast_is_refused():
    class Switches(nn.Module):
        def forward(self, x):
            with torch.set_grad_enabled(False):
                y = x + 1
            return y * 2

    class Casts(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return x @ x

    weight = torch.ones(3, 3, requires_grad=True)
    program = torch.export.export(Switches(), (weight,), strict=False)
    assert any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in program.graph.nodes)
    assert [node.target for node in tidied(program, "x").graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.add.Tensor,
        torch.ops.aten.mul.Tensor,
    ]
    with pytest.raises(ModelError, match="computes under autocast; export it in the dtype"):
        tidied(torch.export.export(Casts(), (torch.ones(3, 3),), strict=False), "x")


def test_names_that_python_has_are_kept():
    graph = program_step(torch.export.export(nn.Linear(3, 2), (torch.zeros(1, 3),)), "a layer")
    assert graph.inputs == ["input"]


def test_a_weight_that_is_written_is_refused():
    class Learns(nn.Linear):
        def forward(self, x):
            self.weight.mul_(2)
            return super().forward(x)

    with pytest.raises(ModelError, match="'a layer' writes to its weight 'weight'"):
        program_step(_export(Learns(3, 2), torch.zeros(1, 3)), "a layer")
