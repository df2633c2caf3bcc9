"""The floor under a kernel's time: bytes or products, whichever takes longer."""

from __future__ import annotations

import math

import pytest

from rotquant_tvm.tuning.arguments import Measurement, Parameter
from rotquant_tvm.tuning.kernel_shape import KernelShape
from rotquant_tvm.tuning.roofline import Roofline, measured_roofline


def linear(rows):
    shape = KernelShape("linear", {"in_features": 64, "out_features": [32, 16], "gated": False})
    sizes = [("x", (rows, 64)), ("weight", (48, 64)), ("y0", (rows, 32)), ("y1", (rows, 16))]
    return Measurement(shape, tuple(Parameter(name, "float16", size) for name, size in sizes))


def test_bytes_or_products():
    one, many = linear(1), linear(1024)
    assert one.flops() == 2 * 64 * 48 and many.flops() == 1024 * one.flops()
    assert one.moved_bytes() == 2 * (64 + 48 * 64 + 48)
    roofline = Roofline(1e9, 1e9)
    assert roofline.floor(one) == one.moved_bytes() / 1e9 and roofline.floor(many) == many.flops() / 1e9
    assert roofline.share(many, 2 * many.flops() / 1e9) == 0.5
    assert Roofline(1e9).floor(many) == many.moved_bytes() / 1e9


@pytest.mark.parametrize("seconds", [0.0, math.inf])
def test_without_a_time_or_a_bandwidth_there_is_no_share(seconds):
    assert Roofline(1e9).share(linear(1), seconds) is None and Roofline().share(linear(1), 1.0) is None


def test_a_causal_prompt_computes_half_of_its_square(definitions):
    from rotquant_tvm.tuning.shape_buckets import shapes_in

    func = definitions("f16")["attention_prefill"]
    shape = KernelShape.of(func)
    found = shapes_in(func, {"batch": 2, "seq": 128, "tiles": 4})
    flops = Measurement(shape, tuple(Parameter(*each) for each in found)).flops()
    assert flops == 4 * 2 * 4 * 64 * (128 * 129 // 2)


def test_this_machine():
    class Device:
        @staticmethod
        def bandwidth():
            class Found:
                copy = 5e9

            return Found

    found = measured_roofline(Device)
    assert found.bandwidth == 5e9 and 1e8 < found.product_rate < 1e14
