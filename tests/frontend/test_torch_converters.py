"""Converters of single torch operators: lookups stay inside their tensor, and TVM has nothing to warn of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from torch.export import Dim
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from rotquant_tvm.frontend.torch_converters import CONVERTERS

ROWS, WIDTH = 11, 5


class Embedding(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(ROWS, WIDTH))

    def forward(self, ids):
        return torch.nn.functional.embedding(ids, self.weight)


class Select(torch.nn.Module):
    def __init__(self, axis: int, index: int):
        super().__init__()
        self.axis, self.index = axis, index

    def forward(self, x):
        return x.select(self.axis, self.index) + 0


class Index(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x[..., [-2], :], x[:, :, [0, -1]]], 2)


def compiled(module: torch.nn.Module, example: torch.Tensor):
    """The module through the importer and TVM, as a function of arrays whose first two axes are dynamic."""
    dynamic = ({0: Dim("batch"), 1: Dim("seq")},)
    program = torch.export.export(module, (example,), dynamic_shapes=dynamic, strict=True)
    mod = from_exported_program(program, run_ep_decomposition=False, custom_convert_map=CONVERTERS)
    machine = relax.VirtualMachine(tvm.compile(mod, "llvm"), tvm.cpu())
    return lambda x: machine["main"](tvm.runtime.tensor(x))[0].numpy()


def test_an_embedding_is_a_lookup_without_a_warning(capfd):
    module = Embedding()
    run = compiled(module, torch.zeros(2, 3, dtype=torch.int64))
    ids = np.random.default_rng(0).integers(0, ROWS, (3, 7))
    np.testing.assert_array_equal(run(ids), module.weight.detach().numpy()[ids])
    assert "Warning" not in capfd.readouterr().err


@pytest.mark.parametrize(("axis", "index"), [(0, 0), (0, -1), (1, 1), (1, -2), (2, 3), (-1, -1)])
def test_select_counts_negative_indices_from_the_end(axis, index, capfd):
    run = compiled(Select(axis, index), torch.zeros(4, 5, 6))
    x = np.random.default_rng(1).standard_normal((7, 9, 6)).astype(np.float32)
    np.testing.assert_array_equal(run(x), np.take(x, index, axis))
    assert "Warning" not in capfd.readouterr().err


def test_indices_count_from_the_end():
    run = compiled(Index(), torch.zeros(4, 5, 6, 3))
    x = np.random.default_rng(2).standard_normal((2, 3, 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(run(x), x[:, :, [4, 0, 5]])
