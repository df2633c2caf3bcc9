"""exp, sigmoid, tanh and erf as polynomials, and powers as products, in loops that LLVM can vectorize.

LLVM calls libm once per element for these. Here each becomes a handful of multiplications, selections and
shifts in float32 without a branch, so that it works in vector registers of any width.
Coefficients are interpolated at Chebyshev nodes in float64 when the module is imported. Errors are relative
and include the rounding of the evaluation: exp 1.2e-7 down to the smallest normal number (subnormal results
are rounded once more), sigmoid 2e-7, tanh and erf 3e-7.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx

_EXP_LOW, _EXP_HIGH = -104.0, 88.8
"""Beyond these exp is 0 and inf in float32."""
_LN2_HIGH = 0.693359375
"""The leading 10 bits of ln 2: its product with an exponent is exact."""
_LN2_LOW = math.log(2) - _LN2_HIGH
_TANH_SMALL = 0.625
_ERF_SMALL, _ERF_LARGE = 1.0, 4.0


def _interpolate(f: Callable[[float], float], low: float, high: float, degree: int) -> list[float]:
    """Coefficients, lowest first, of the polynomial through f at the Chebyshev nodes of [low, high]."""
    series = np.polynomial.chebyshev.Chebyshev.interpolate(np.vectorize(f), degree, [low, high])
    return [float(c) for c in series.convert(kind=np.polynomial.Polynomial).coef]


def _exp_remainder(r: float) -> float:
    """(exp(r) - 1 - r) / r² by its series."""
    return sum(r**i / math.factorial(i + 2) for i in range(12))


def _tanh_remainder(s: float) -> float:
    """(tanh(x) / x - 1) / x² for s = x²; at 0 its limit."""
    x = math.sqrt(s)
    return (math.tanh(x) / x - 1) / s if s > 1e-6 else -1 / 3 + s * 2 / 15


def _erf_ratio(s: float) -> float:
    x = math.sqrt(s)
    return math.erf(x) / x if x > 1e-8 else 2 / math.sqrt(math.pi)


def _scaled_erfc(t: float) -> float:
    """exp(x²) erfc(x) for t = 1 / (1 + x)."""
    x = 1 / t - 1
    return math.exp(x * x) * math.erfc(x)


_EXP = _interpolate(_exp_remainder, -math.log(2) / 2 - 1e-4, math.log(2) / 2 + 1e-4, 5)
_TANH = _interpolate(_tanh_remainder, 0, _TANH_SMALL**2, 5)
_ERF = _interpolate(_erf_ratio, 0, _ERF_SMALL**2, 7)
_ERFC = _interpolate(_scaled_erfc, 1 / (1 + _ERF_LARGE), 1 / (1 + _ERF_SMALL), 7)


def _f32(value: float) -> tirx.Expr:
    return tirx.const(value, "float32")


def _let(value: tirx.Expr, body: Callable[[tirx.Var], tirx.Expr]) -> tirx.Expr:
    """Bind ``value`` once, since an expression would be computed at each of its uses."""
    var = tirx.Var("t", value.ty)
    return tirx.Let(var, value, body(var))


def _horner(x: tirx.Expr, coefficients: list[float]) -> tirx.Expr:
    result = _f32(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        result = result * x + _f32(c)
    return result


def _power_of_two(n: tirx.Expr) -> tirx.Expr:
    """2^n for int32 n in [-126, 127]: the bits of the exponent."""
    return tirx.reinterpret("float32", tirx.shift_left(n + 127, tirx.const(23, "int32")))


def exp(x: tirx.Expr) -> tirx.Expr:
    """Exponential of a float32: 2^n times a polynomial of r, with x = n ln 2 + r and abs(r) <= ln 2 / 2."""

    def scaled(n: tirx.Var, r: tirx.Var) -> tirx.Expr:
        # In two factors, so that results below the smallest normal number come out and 2^128 does not wrap.
        half = tirx.shift_right(n, tirx.const(1, "int32"))
        value = _horner(r, _EXP) * r * r + r + _f32(1)
        return _let(half, lambda h: value * _power_of_two(h) * _power_of_two(n - h))

    def reduced(clipped: tirx.Var, n: tirx.Var) -> tirx.Expr:
        whole = n.astype("float32")
        return _let(clipped - whole * _f32(_LN2_HIGH) - whole * _f32(_LN2_LOW), lambda r: scaled(n, r))

    def finite(clipped: tirx.Var) -> tirx.Expr:
        # Truncation rounds a positive number down: shift by 256, add a half.
        n = (clipped * _f32(1 / math.log(2)) + _f32(256.5)).astype("int32") - 256
        return _let(n, lambda n: reduced(clipped, n))

    def clipped(x: tirx.Var) -> tirx.Expr:
        low, high = _f32(_EXP_LOW), _f32(_EXP_HIGH)
        inside = tirx.Select(x > low, tirx.Select(x < high, x, high), low)
        return tirx.Select(tirx.isnan(x), x, _let(inside, finite))

    return _let(x, clipped)


def sigmoid(x: tirx.Expr) -> tirx.Expr:
    """Logistic function of a float32: 1 / (1 + exp(-x)), which is 0 below -88.7."""
    return _f32(1) / (_f32(1) + exp(_f32(0) - x))


def tanh(x: tirx.Expr) -> tirx.Expr:
    """Hyperbolic tangent of a float32: a polynomial near 0, else 1 - 2 / (exp(2 x) + 1)."""

    def body(x: tirx.Var) -> tirx.Expr:
        small = _let(x * x, lambda s: x + x * s * _horner(s, _TANH))
        large = _f32(1) - _f32(2) / (exp(x + x) + _f32(1))
        return tirx.Select(tirx.abs(x) < _f32(_TANH_SMALL), small, large)

    return _let(x, body)


def erf(x: tirx.Expr) -> tirx.Expr:
    """Error function of a float32: a polynomial near 0, else 1 - exp(-x²) p(1 / (1 + abs(x)))."""

    def tail(a: tirx.Var) -> tirx.Expr:
        beyond = _let(_f32(1) / (_f32(1) + a), lambda t: _horner(t, _ERFC))
        return tirx.Select(a < _f32(_ERF_LARGE), _f32(1) - exp(_f32(0) - a * a) * beyond, _f32(1))

    def body(x: tirx.Var) -> tirx.Expr:
        small = x * _let(x * x, lambda s: _horner(s, _ERF))
        large = _let(tirx.abs(x), tail)
        signed = tirx.Select(x < _f32(0), _f32(0) - large, large)
        outside = tirx.Select(tirx.isnan(x), x, signed)
        return tirx.Select(tirx.abs(x) < _f32(_ERF_SMALL), small, outside)

    return _let(x, body)


_FUNCTIONS = {"tirx.exp": exp, "tirx.sigmoid": sigmoid, "tirx.tanh": tanh, "tirx.erf": erf}


def _power(call: tvm.ir.Call) -> tirx.Expr:
    base, exponent = call.args
    value = exponent.value if isinstance(exponent, tirx.FloatImm) else None
    if value == 2.0:
        return _let(base, lambda t: t * t)
    if value == 3.0:
        return _let(base, lambda t: t * t * t)
    return tirx.sqrt(base) if value == 0.5 else call


def _replace(call: tvm.ir.Call) -> tirx.Expr:
    name = call.op.name if isinstance(call.op, tvm.ir.Op) else ""
    if name == "tirx.pow":
        return _power(call)
    function, dtype = _FUNCTIONS.get(name), str(call.ty)
    if function is None or dtype not in ("float32", "float16"):
        return call
    return function(call.args[0].astype("float32")).astype(dtype)


def _widened(cast: tirx.Cast) -> tirx.Expr:
    """A bfloat16 as float32, by its bits.

    TVM's own legalization of bfloat16 comes later, and mixes up the variables of ``Let`` that have such a cast in them.
    """
    if str(cast.ty) != "float32" or str(cast.value.ty) != "bfloat16":
        return cast
    bits = tirx.reinterpret("uint16", cast.value).astype("uint32")
    return tirx.reinterpret("float32", tirx.shift_left(bits, tirx.const(16, "uint32")))


def vectorizable_math(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Replace these functions throughout a PrimFunc; float16 is computed in float32, other dtypes stay."""
    return func.with_body(tvm_ffi.structural_map(func.body, [(tvm.ir.Call, _replace), (tirx.Cast, _widened)]))
