"""Codes as the integer part of a polynomial, and half tiles that are quantized 16 dims at a time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from rotquant_tvm.schedules.block_codes_cuda import MIDDLE, code_polynomial, has_block_codes

from ..ops.cases import Case
from ..ops.reference import BOUNDARY_ROUNDING, codec_of
from ..ops.test_append import check_append, random_step
from ..sampling import sampled
from .simulated_append import append_on_few_multiprocessors
from .test_append_cuda import shape_of

HEAD_DIMS = (32, 64, 80, 96, 128, 240, 256, 512)
CASES = [Case("hurwitz3:ip/hurwitz2", 64, 1, 1), Case("iso3/planar1", 80, 1, 1), Case("turbo3:mse/hurwitz3", 128, 1, 1)]
TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def float32_codes(z, coefficients, bits):
    """The codes of values of norm 1, in the kernel's own steps."""
    square, total = z * z, np.float32(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * square + np.float32(coefficient)
    part = np.clip(z * total + np.float32(MIDDLE), np.float32(0), np.float32(1))
    return np.floor(part.astype(np.float64) * np.nextafter(np.float32(2**bits), np.float32(0)))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_codes_change_at_the_boundaries_alone(head_dim, bits):
    codec = codec_of(f"planar{bits}", head_dim)
    coefficients = [c / 2**bits for c in code_polynomial(codec)]
    near = np.add.outer(codec.codebook.boundaries, np.linspace(-1, 1, 2001) * 1e-5).ravel()
    z = np.concatenate([near, np.linspace(-1, 1, 100001)]).astype(np.float32)
    exact = (codec.codebook.boundaries[None, :] < z.astype(np.float64)[:, None]).sum(1)
    gap = np.abs(codec.codebook.boundaries[None, :] - z.astype(np.float64)[:, None]).min(1)
    differs = float32_codes(z, coefficients, bits) != exact
    assert gap[differs].max(initial=0) < BOUNDARY_ROUNDING / 4
    assert differs.mean() < 0.02


def test_all_zeros_get_the_middle_code():
    for bits in (1, 2, 3):
        coefficients = code_polynomial(codec_of(f"planar{bits}", 64))
        assert float32_codes(np.zeros(1, np.float32), coefficients, bits) == 2 ** (bits - 1)


@pytest.mark.parametrize(
    ("text", "dtype"), [("hurwitz4", "float16"), ("q8_0", "float16"), ("turbo2.5", "float16"), ("hurwitz3", "float32")]
)
def test_others_go_another_way(text, dtype):
    assert not has_block_codes(codec_of(text, 64), dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", sampled(CASES, CASES[:1]), ids=str)
def test_awkward_rows(case, dtype):
    """Zeros, infinities, NaN and numbers beyond the stored range, among others; very small and very large norms."""
    rng = np.random.default_rng(len(str(case)))
    before, new = [31, 3], [34, 17]
    cache, k, v = random_step(rng, case, new)
    k[0, :, 0, 3], v[0, :, 2, 7], k[0, :, 3, 0], v[0, :, 5] = 1e9, -np.inf, np.nan, 0
    k[0, :, 7], v[1, :, 9], k[1, :, 4] = k[0, :, 7] * 1e-6, v[1, :, 9] * 3e4, 0
    with np.errstate(over="ignore"):
        k, v = (x.astype(TYPES[dtype]) for x in (k, v))
    after = append_on_few_multiprocessors(shape_of(case, dtype), case.codecs, cache, (k, v), before, new)
    check_append(case, cache, after, [x.astype(np.float64) for x in (k, v)], before, new, ties=True)
