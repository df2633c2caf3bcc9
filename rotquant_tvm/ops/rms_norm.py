"""RMS norm over the last axis: y = round(x / rms(x)) · weight."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from .model_op import model_attrs

RMS_NORM = "rms_norm"
"""The operator's name."""


def rms_norm_attrs(features: int, epsilon: float, leading: int) -> dict[str, str]:
    """The attributes of a kernel over rows of ``features`` behind ``leading`` symbolic sizes."""
    return model_attrs(RMS_NORM, {"features": features, "epsilon": epsilon, "leading": leading})


def rms_norm(features: int, epsilon: float, leading: int) -> tirx.PrimFunc:
    """Define ``rms_norm(x, weight, y)``, all float16; sums and products are float32."""
    lead = [tirx.Var(f"d{i}", "int64") for i in range(leading)]
    x = te.placeholder((*lead, features), "float16", "x")
    weight = te.placeholder((features,), "float16", "weight")
    k = te.reduce_axis((0, features), "k")

    def square(*row: Any) -> Any:
        value = x[(*row, k)].astype("float32")
        return te.sum(value * value, axis=k)

    squares = te.compute(lead, square, "squares")

    def normalized(*index: Any) -> Any:
        scale = tirx.rsqrt(squares[index[:-1]] / tirx.const(features, "float32") + tirx.const(epsilon, "float32"))
        rounded = (x[index].astype("float32") * scale).astype("float16").astype("float32")
        return (rounded * weight[index[-1]].astype("float32")).astype("float16")

    y = te.compute((*lead, features), normalized, "y0")
    return te.create_prim_func([x, weight, y]).with_attrs(rms_norm_attrs(features, epsilon, leading))
