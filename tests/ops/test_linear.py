"""The definition of linear layers against float64 products, with weights as they are stored and in tiles."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules.linear_llvm import pack_weight

from rotquant_tvm.ops.linear import LinearShape, linear
from rotquant_tvm.ops.model_op import model_op, model_properties

PLAIN = {"input_dtype": "float32", "weight_dtype": "float32", "output_dtype": "float32"}
SHAPES = {
    "one": LinearShape(12, (5,), (False,), False, False, 2, **PLAIN),
    "three": LinearShape(8, (5, 3, 2), (True, False, True), False, False, 1, **PLAIN),
    "residual": LinearShape(8, (6,), (True,), True, False, 2, **PLAIN),
    "gated": LinearShape(8, (6, 6), (False, False), False, True, 2, **PLAIN),
    "tiled": LinearShape(8, (5, 9), (False, True), False, False, 2, **PLAIN, tile=4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_products(name):
    shape, rng = SHAPES[name], np.random.default_rng(0)
    lead = (3, 2)[: shape.leading]
    x = rng.standard_normal((*lead, shape.in_features)).astype("float32")
    weights = [rng.standard_normal((n, shape.in_features)).astype("float32") for n in shape.out_features]
    layers = zip(shape.out_features, shape.bias, strict=True)
    biases = [rng.standard_normal(n).astype("float32") for n, has in layers if has]
    residual = [rng.standard_normal((*lead, shape.out_features[0])).astype("float32")] if shape.residual else []
    stored = [pack_weight(weight, shape.tile) for weight in weights] if shape.tile else weights
    widths = shape.out_features[:1] if shape.gated else shape.out_features
    outputs = [np.full((*lead, n), np.nan, "float32") for n in widths]
    tensors = [tvm.runtime.tensor(a) for a in (x, np.concatenate(stored), *biases, *residual, *outputs)]
    assert tuple(tensors[1].shape) == shape.weight_shape
    tvm.compile(tvm.IRModule({"main": linear(shape)}), "llvm")["main"](*tensors)

    rest = iter(biases)
    exact = [x.astype("float64") @ weight.T.astype("float64") for weight in weights]
    exact = [part + next(rest) if has else part for part, has in zip(exact, shape.bias, strict=True)]
    if shape.gated:
        exact = [exact[0] / (1 + np.exp(-exact[0])) * exact[1]]
    for tensor, part in zip(tensors[-len(outputs) :], exact, strict=True):
        np.testing.assert_allclose(tensor.numpy(), part + (residual[0] if residual else 0), rtol=1e-5, atol=1e-5)


def test_a_shape_is_read_as_it_was_written():
    for shape in SHAPES.values():
        func = linear(shape)
        assert model_op(func) == "linear" and LinearShape.read(model_properties(func)) == shape
