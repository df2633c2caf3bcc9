"""The append kernels for CUDA: every test of the definition, the other element types, and machine code for each GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from rotquant_tvm.schedules.append_cuda import KNOBS, append_cuda, append_kernel
from rotquant_tvm.schedules.knobs import with_knobs

from rotquant_tvm import ops
from rotquant_tvm.ops.site_shape import SiteShape

from ..ops.cases import CASES, Case
from ..ops.conftest import has_gpu
from ..ops.conftest import rng as _rng
from ..ops.reference import layout_of, random_words
from ..ops.test_append import (  # noqa: F401 (tests of the definition, collected here with other kernels)
    TILES,
    append,
    check_append,
    random_step,
    test_any_lengths,
    test_awkward_vectors,
    test_codes_of_tokens_taken_back_are_overwritten,
    test_half_precision_source,
    test_new_tokens_are_encoded_and_nothing_else_changes,
    test_offsets_beyond_32_bits,
    test_token_by_token_is_the_same_as_all_at_once,
    test_tokens_past_the_capacity_are_dropped,
)
from ..sampling import sampled
from .cuda_targets import ARCHITECTURES, cubin, target_of
from .hand_laid_writers import HandLaidWriters

ONE_TOKEN = [0, 1, 7, 8, 15, 16, 17, 30, 31, 32, 63, 94, 95, 96]
MORE_CASES = [
    *(Case(f"hurwitz{bits}", head_dim, 2, 2) for bits in (1, 2, 3, 4) for head_dim in (64, 80, 96, 128, 256)),
    Case("iso3/planar2", 32, 2, 2),
    Case("iso3:ip/planar4:norm", 112, 1, 1),
    Case("turbo1/turbo3:mse", 64, 2, 2),
    Case("rotor2/rotor4", 240, 1, 1),
    Case("dense3/hurwitz3", 128, 2, 2),
    Case("q8_0", 128, 2, 2),
    Case("q4_0/f16", 112, 2, 2),
    Case("bf16/q8_0", 64, 2, 2),
]
DECLINED = [Case("rotor3+tcq/planar2+tcq", 80, 4, 2), Case("q4_0/turbo3.5", 64, 4, 2)]


rng = _rng


@pytest.fixture(scope="module")
def kernels():
    """The operators, append laid out by hand."""
    if not has_gpu():
        pytest.skip("no CUDA device")
    return HandLaidWriters()


def shape_of(case, dtype="float16"):
    """The shape of a case's cache."""
    names = [codec.format.name for codec in case.codecs]
    return SiteShape(*names, case.heads, case.kv_heads, case.head_dim, 1.0, None, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", MORE_CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_formats(kernels, rng, case, dtype):
    before, new = [0, 31, 5, 64, 17], [96, 34, 0, 1, 60]
    cache, k, v = random_step(rng, case, new, dtype)
    after = append(kernels, case, cache, k, v, before, new)
    check_append(case, cache, after, (k, v), before, new)
    declined = append_kernel(shape_of(case, dtype), kernels.target) is None
    assert ops.append in kernels.laid_out or declined


@pytest.fixture(scope="module", params=[0, 1], ids=["tiles", "single"])
def token_kernels(request):
    """The operators, with and without a launch for single tokens."""
    if not has_gpu():
        pytest.skip("no CUDA device")
    return HandLaidWriters(single=request.param)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*MORE_CASES, *CASES], ids=str)
def test_one_token(token_kernels, rng, case):
    """At every kind of place in a tile, also past the capacity, and for sequences that have no new token."""
    kernels = token_kernels
    before = np.array(ONE_TOKEN)
    new = [int(token != 15) for token in before]
    cache, k, v = random_step(rng, case, new, "float16")
    after = append(kernels, case, cache, k, v, before, new)
    check_append(case, cache, after, (k, v), before, new)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [CASES[0], CASES[5], Case("iso3/q4_0", 80, 2, 2)], ids=str)
@pytest.mark.parametrize("seq", [1, 45])
def test_brain_floats(kernels, rng, case, seq):
    """bfloat16 keys and values, some beyond what float16 holds."""
    new, before = [seq, seq], [3, 32]
    cache, k, v = random_step(rng, case, new)
    k[0, :, 0, 3], v[1, :, 0, 7], k[1, :, 0, 0] = 1e9, -np.inf, np.nan
    kernel = kernels.build(ops.append, *case.codecs, case.kv_heads, "bfloat16")
    words, a, b = (torch.tensor(x, device="cuda") for x in (cache.view(np.int32), k, v))
    a, b = a.bfloat16(), b.bfloat16()
    rest = [codec.coefficients for codec in case.codecs]
    rest += [np.array(before, np.int32) + seq, np.array(new, np.int32)]
    kernel(words.view(torch.uint32), a, b, *(torch.tensor(x, device="cuda") for x in rest))
    torch.cuda.synchronize()
    sources = [x.double().cpu().numpy() for x in (a, b)]
    check_append(case, cache, words.cpu().numpy().view(np.uint32), sources, before, new)


@pytest.mark.gpu
def test_the_same_every_time(kernels, rng):
    """Many tiles at once; a missing barrier gives other bits now and then."""
    case, batch, tokens = Case("hurwitz3:ip/hurwitz3", 128, 8, 4), 16, 200
    cache = random_words(rng, layout_of(case.codecs), (batch, case.kv_heads, 8))
    k, v = (rng.standard_normal((batch, case.kv_heads, tokens, 128)).astype("float16") for _ in "kv")
    new = rng.integers(0, tokens + 1, batch)
    before = rng.integers(0, 56, batch)
    results = [append(kernels, case, cache, k, v, before, new) for _ in range(20)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.gpu
@pytest.mark.parametrize("knobs", [{name: value} for name, values in KNOBS.items() for value in values], ids=str)
def test_knobs(rng, knobs):
    if not has_gpu():
        pytest.skip("no CUDA device")
    case, before, new = Case("hurwitz3", 128, 2, 2), [0, 20], [96, 60]
    cache, k, v = random_step(rng, case, new, "float16")
    after = append(HandLaidWriters(**knobs), case, cache, k, v, before, new)
    check_append(case, cache, after, (k, v), before, new)


@pytest.mark.parametrize("case", DECLINED, ids=str)
def test_other_formats_are_declined(case):
    assert append_kernel(shape_of(case), target_of("sm_90a")) is None


@pytest.mark.parametrize("case", [Case("hurwitz3", 64, 9, 3), Case("q8_0/hurwitz4", 128, 2, 2)], ids=str)
def test_the_rule_takes_what_it_knows(case):
    func = ops.append(*case.codecs, case.kv_heads, "float16", ops.Axes("cuda"))
    assert append_cuda(func, target_of("sm_90a")) is None
    kernel = append_cuda(with_knobs(shape_of(case).attach(func), {"warps": 4}), target_of("sm_90a"))
    assert [p.name for p in kernel.params] == [p.name for p in func.params]


@pytest.mark.parametrize("case", DECLINED, ids=str)
def test_the_rule_declines_other_formats(case):
    func = shape_of(case).attach(ops.append(*case.codecs, case.kv_heads, "float16", ops.Axes("cuda")))
    assert append_cuda(func, target_of("sm_90a")) is None


def test_an_append_that_waits_for_an_attention():
    case = Case("hurwitz3", 64, 9, 3)
    shape = replace(shape_of(case), window=40)
    for after in (0, 9):
        func = ops.append(*case.codecs, case.kv_heads, "float16", ops.Axes("cuda"), wraps=True, after=after)
        kernel = append_cuda(shape.attach(func), target_of("sm_90a"))
        assert [p.name for p in kernel.params] == [p.name for p in func.params]


@pytest.mark.parametrize("arch", sampled(ARCHITECTURES, ARCHITECTURES[-1:]))
@pytest.mark.parametrize(
    "case",
    [Case("hurwitz3:ip/hurwitz3", 128, 8, 8), Case("rotor3/q8_0", 80, 2, 2), Case("f16/q4_0", 64, 2, 2)],
    ids=str,
)
def test_it_becomes_machine_code(arch, case):
    assert cubin(lambda target: append_kernel(shape_of(case), target), arch)
