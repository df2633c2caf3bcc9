"""Operators of exported programs: each computes in Relax what torch computes, or is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.torch_program import program_step
from rotquant_tvm.frontend.torch_program_module import export_module

from ..sampling import sampled
from .program_runner import run_step

_RNG = np.random.default_rng(2)


def _tensor(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.from_numpy(_RNG.standard_normal(shape).astype(np.float32)).to(dtype)


def _compare(function, inputs: dict[str, torch.Tensor], tolerance: float = 1e-5):
    """Export a function, run its step in NumPy and compare every result with torch's; return the step."""

    class Step(nn.Module):
        forward = staticmethod(function)

    graph = program_step(export_module(Step(), inputs), "a function")
    outputs = run_step(graph, **{name: value.numpy() for name, value in inputs.items()})
    expected = function(**inputs)
    for ours, theirs in zip(outputs.values(), expected, strict=True):
        assert ours.dtype == theirs.numpy().dtype and ours.shape == tuple(theirs.shape)
        np.testing.assert_allclose(ours.astype(np.float64), theirs.numpy().astype(np.float64), atol=tolerance)
    return graph


def _attentions(q, k, v, visible, bias):
    attend = functional.scaled_dot_product_attention
    grouped = [x[:, ::2] for x in (k, v)]
    return (
        attend(q, k, v),
        attend(q, k, v, scale=0.5),
        attend(q, k, v, attn_mask=visible),
        attend(q, k, v, attn_mask=visible[None, None], scale=0.3),
        attend(q, k, v, attn_mask=bias),
        attend(q, k, v, attn_mask=bias[:, :1] * 2),
        attend(q, *grouped, enable_gqa=True, attn_mask=visible),
        attend(q, q, q, is_causal=True),
        attend(q, q[:, :2], q[:, :2], is_causal=True, enable_gqa=True, scale=0.2),
    )


@pytest.mark.parametrize("dtype", sampled([torch.float32, torch.float16], [torch.float32]))
def test_attention_keeps_its_mask_scale_and_groups(dtype):
    visible = torch.ones(5, 9, dtype=torch.bool).tril(4)
    visible[0, 1:] = False
    q, k, v, bias = _tensor(2, 4, 5, 16), _tensor(2, 4, 9, 16), _tensor(2, 4, 9, 16), _tensor(2, 4, 5, 9)
    inputs = {"q": q, "k": k, "v": v, "visible": visible, "bias": bias}
    inputs = {name: x if x.dtype is torch.bool else x.to(dtype) for name, x in inputs.items()}
    graph = _compare(_attentions, inputs, 1e-5 if dtype is torch.float32 else 5e-3)
    script = graph.mod.script()
    assert script.count("R.nn.attention") == 9 and script.count('causal_mask="BottomRight"') == 2


def _writes(cache, new, at):
    first = cache.index_copy(2, at, new)
    second = cache.clone()
    second[:, :, at] = new
    third = cache.transpose(1, 2).contiguous()
    third[:, at] = new.transpose(1, 2)
    fourth = cache.clone()
    fourth[:, :, at] = 7.0
    fifth = torch.zeros_like(cache)
    fifth[:, :, 1:4] = new[:, :, :3]
    fifth[:, 1:, -2:] = new[:, 1:, :2]
    fifth[:, :, ::3] = new[:, :, :3]
    return first, second, third, fourth, fifth


def test_writes_go_to_their_positions():
    _compare(_writes, {"cache": _tensor(2, 3, 8, 4), "new": _tensor(2, 3, 4, 4), "at": torch.tensor([5, 0, 2, 7])})


def _others(x, index, mask, weight):
    filled = torch.full_like(x, 3), x.new_zeros(x.shape[0], 2, dtype=torch.int64), x.new_ones((3,), dtype=torch.bool)
    return (
        functional.rms_norm(x, (6,), weight, 1e-3),
        functional.rms_norm(x, (6,)),
        x[index],
        x[:, index],
        weight[index - 2],
        x.repeat_interleave(3, dim=1),
        torch.where(mask, x, 1.0),
        torch.where(mask, -1.0, x),
        x.masked_fill(mask, float("-inf")).clamp(min=-2.0),
        functional.dropout(x, 0.5, training=False),
        *filled,
    )


def test_other_operators():
    x = _tensor(4, 5, 6)
    index = torch.tensor([[3, 0], [2, 2]])
    _compare(_others, {"x": x, "index": index, "mask": x > 0.2, "weight": _tensor(6)})


def _products(x, weight, bias):
    batched = torch.bmm(x, weight.expand(x.shape[0], -1, -1))
    return x @ weight, batched, functional.linear(x, weight.T, bias), torch.addmm(bias, x[0], weight)


def test_products_of_half_precision_stay_in_half_precision():
    inputs = {"x": _tensor(2, 3, 4), "weight": _tensor(4, 5), "bias": _tensor(5)}
    _compare(_products, {name: x.half() for name, x in inputs.items()}, 2e-2)


def test_bfloat16_is_kept():
    graph = program_step(
        export_module(nn.Linear(4, 3).bfloat16(), {"input": _tensor(2, 4, dtype=torch.bfloat16)}), "a layer"
    )
    assert {str(weight.dtype) for weight in graph.weights} == {"bfloat16"}
    assert str(graph.mod["main"].ret_ty.fields[0].dtype) == "bfloat16"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, at: (x.index_put((at, at), x[0, 0], accumulate=False),), "cache\\[:, :, positions\\] = new"),
        (lambda x, at: (torch.ops.aten.index_put(x, [None, at], x[:, at], True),), "cache\\[:, :, positions\\] = new"),
        (lambda x, at: (torch.add(x, x, alpha=2),), "factor alpha or beta"),
        (lambda x, at: (torch.nonzero(at).float(),), "keep positions in tensors"),
        (lambda x, at: (torch.linalg.det(x @ x.transpose(1, 2)),), "cannot be imported: aten._linalg_det"),
    ],
)
def test_what_has_no_converter_is_refused_by_name(function, message):
    with pytest.raises(ModelError, match=message):
        _compare(function, {"x": _tensor(4, 5, 6), "at": torch.tensor([0, 2])})


def test_quantized_weights_are_refused():
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    layer.forward = lambda x: x @ layer.weight.to(x.dtype).T
    with pytest.raises(ModelError, match=r"has the weight 'weight' in torch.int8; export it in float32"):
        program_step(export_module(layer, {"x": _tensor(2, 4)}), "a layer")
