"""A user's own module: what of it is exported by itself, and what is refused with the remedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from rotquant_tvm.errors import ModelError, UsageError
from rotquant_tvm.frontend import from_torch
from rotquant_tvm.frontend.torch_program import program_step
from rotquant_tvm.frontend.torch_program_module import export_module

from ..sampling import sampled
from .torch_modules import BufferDecoder, PlainDecoder, randomized

IDS = torch.zeros((2, 3), dtype=torch.int64)
ROW = IDS[:1]


class _ReadsNumbers(BufferDecoder):
    def forward(self, idx, input_pos):
        return super().forward(idx + 1 if int(input_pos[0]) > 3 else idx, input_pos)


class _TakesNumber(BufferDecoder):
    def forward(self, idx, start):
        return super().forward(idx, torch.arange(idx.shape[1]) + start)


class _GrowingAttribute(nn.Module):
    """Keeps its past in an attribute; ``container`` in a dict, else in a buffer."""

    def __init__(self, container: bool):
        super().__init__()
        self.embedding, self.container = nn.Embedding(97, 64), {}
        past = torch.zeros(1, 4, 2, 16)
        if container:
            self.container["past"] = past
        else:
            self.register_buffer("past", past)

    def forward(self, idx):
        x = self.embedding(idx).view(1, -1, 4, 16).transpose(1, 2)
        if self.container:
            past = self.container["past"] = torch.cat([self.container["past"], x], dim=2)
        else:
            past = self.past = torch.cat([self.past, x], dim=2)
        return functional.scaled_dot_product_attention(x, past, past).transpose(1, 2).flatten(2)


class _Branches(PlainDecoder):
    def forward(self, idx):
        return torch.cond(idx.sum() > 3, lambda x: x + 1.0, lambda x: x * 2.0, (super().forward(idx),))


class _Drops(PlainDecoder):
    def forward(self, idx):
        return functional.dropout(super().forward(idx), 0.5, training=True)


class _Rolls(BufferDecoder):
    def forward(self, idx, input_pos):
        for cache in self.caches:
            cache.k_cache.copy_(cache.k_cache.roll(-1, dims=2))
        return super().forward(idx, input_pos)


class _Complex(PlainDecoder):
    def forward(self, idx):
        x = super().forward(idx)
        return torch.view_as_real(torch.view_as_complex(torch.stack([x, x], -1)) * 1j)[..., 0]


class _Attention(nn.Module):
    """One attention over what it is given, called as the test says."""

    def __init__(self, **arguments):
        super().__init__()
        self.arguments = arguments

    def forward(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, **self.arguments)


def _heads(length=3, heads=4, dim=16):
    return torch.zeros(2, heads, length, dim)


REFUSED = {
    "branch on a value": (_ReadsNumbers, (ROW, torch.arange(3)), "keep positions in tensors, without .item()"),
    "a number": (_TakesNumber, (ROW, 3), "takes the number 3, which an export makes a constant"),
    "growing buffer": (lambda: _GrowingAttribute(False), (ROW,), "puts a new tensor in place of 'past'"),
    "growing dict": (lambda: _GrowingAttribute(True), (ROW,), "puts a new tensor in place of 'container.past'"),
    "other arguments": (PlainDecoder, (IDS, IDS), "'PlainDecoder' cannot be exported: "),
    "control flow": (_Branches, (IDS,), "branches or loops on its data"),
    "dropout": (_Drops, (IDS,), "drops values out; call model.eval"),
    "rolling cache": (_Rolls, (ROW, torch.arange(3)), "a cache that is rolled is not supported"),
    "complex numbers": (_Complex, (IDS,), "complex numbers are not supported"),
    "causal from the start": (lambda: _Attention(is_causal=True), (_heads(), _heads(5), _heads(5)), "give it a mask"),
    "latent attention": (_Attention, (_heads(), _heads(), _heads(dim=8)), "latent attention"),
    "attention dropout": (lambda: _Attention(dropout_p=0.1), (_heads(), _heads(), _heads()), "drops scores out"),
    "attention of rank 3": (_Attention, (_heads()[0], _heads()[0], _heads()[0]), "operands that are not"),
}


ORDINARY = ("branch on a value", "a number", "growing buffer", "rolling cache", "causal from the start")


@pytest.mark.parametrize("name", sampled(REFUSED, ORDINARY))
def test_a_module_is_refused_with_the_remedy(name):
    make, inputs, message = REFUSED[name]
    module = make()
    with pytest.raises(ModelError, match=message) as refusal:
        program_step(export_module(module, inputs), type(module).__name__)
    assert "\n" not in str(refusal.value)


def test_the_sizes_that_vary_are_found_and_the_module_is_left_as_it_was():
    module = randomized(PlainDecoder())
    module.train()
    graph = program_step(export_module(module, {"idx": IDS}), "a module")
    batch, seq = graph.mod["main"].params[0].ty.shape.values
    assert {size.name for size in (batch, seq)} == {str(batch), str(seq)} and str(batch) != str(seq)
    assert all(part.training for part in module.modules())
    assert not module._forward_hooks and not module._forward_pre_hooks
    np.testing.assert_array_equal(graph.weights[0].shape, (97, 128))


def test_example_inputs_belong_to_modules_alone():
    with pytest.raises(UsageError, match="a tuple of what forward"):
        export_module(PlainDecoder(), "idx")
    with pytest.raises(ModelError, match="PlainDecoder is not a transformers model; give its step's example_inputs"):
        from_torch(PlainDecoder())
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    with pytest.raises(UsageError, match="takes neither example_inputs nor dynamic_shapes"):
        from_torch(program, example_inputs=(IDS,))
