"""Several kernels in one function: each launch takes the one tuned for sizes nearest to its own."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules.attention_decode_cuda import attention_decode_cuda, build
from rotquant_tvm.schedules.gpu_kv_kernels import gpu_kernel
from rotquant_tvm.schedules.kernel_by_size import choices_of, kernel_by_size, with_choices

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.codegen import compile_module

from ..ops.cases import Case
from ..ops.reference import filled_cache
from .cuda_targets import target_of
from .simulated_decode import DecodeGPU
from .test_attention_decode_cuda import check, expected_of, shape_of

CASE = Case("hurwitz3", 64, 4, 2)
SMALL, LARGE = {"warps": 4, "blocks": 24}, {"warps": 8, "blocks": 48}
CHOICES = [({"batch": 1, "tiles": 4}, SMALL), ({"batch": 1, "tiles": 64}, LARGE), ({"batch": 8, "tiles": 4}, LARGE)]


def definition():
    """Something that carries what a rule looks at."""
    return build(shape_of(CASE), target_of("sm_90a"))


def launches(kernel) -> int:
    return kernel.script().count('launch_thread("blockIdx.x"')


def merged(choices):
    return kernel_by_size(definition(), choices, partial(attention_decode_cuda, target=target_of("sm_90a")))


@pytest.mark.parametrize(
    ("batch", "tiles", "warps"), [(1, 1, 4), (1, 15, 4), (1, 17, 8), (3, 4, 8), (2, 4, 4), (40, 1, 8)], ids=str
)
def test_the_nearest_sizes_decide(batch, tiles, warps):
    rng = np.random.default_rng(batch + tiles)
    lengths = rng.integers(1, 32 * tiles + 1, batch).astype(np.int32)
    cache = filled_cache(rng, CASE.codecs, CASE.kv_heads, tiles, lengths)
    q = rng.standard_normal((batch, 1, CASE.heads, CASE.head_dim)).astype(np.float32)
    out, counters = np.full_like(q, np.nan), np.zeros(1 << 16, np.int32)
    gpu = DecodeGPU(merged(CHOICES))
    gpu(q, cache, lengths, counters, out)
    assert gpu.grid["threadIdx.x"] == 32 * warps
    check(out.astype(np.float64), expected_of(CASE, q, cache, lengths), 2e-3)


def test_what_a_rule_declines_is_left_out():
    assert kernel_by_size(definition(), CHOICES, lambda _func: None) is None

    def only_small(func):
        kernel = attention_decode_cuda(func, target_of("sm_90a"))
        return kernel if '"warps": 4' in str(func.attrs["rotquant.knobs"]) else None

    alone = kernel_by_size(definition(), CHOICES, only_small)
    assert launches(alone) == 1 < launches(merged(CHOICES))


def test_definitions_carry_the_choices():
    func = with_choices(definition(), CHOICES)
    assert choices_of(func) == CHOICES
    kernel = gpu_kernel(func, target_of("sm_90a"))
    assert choices_of(kernel) == []
    assert launches(kernel) == 2  # one for each choice of knobs, not for each bucket


def test_choices_that_agree_are_none():
    same = [(bucket, SMALL) for bucket, _ in CHOICES]
    assert choices_of(with_choices(definition(), same)) == []


def test_it_compiles_to_a_kernel_for_each():
    target = target_of("sm_90a")
    kernel = merged(CHOICES).with_attr("global_symbol", "kernel")
    compiled = compile_module(tvm.IRModule({"kernel": kernel}), target)
    assert compiled["kernel"] is not None


def test_blocks_of_centres_do_not_count_beside_tiles():
    """64 sequences of 512 tiles are nearer to 64 of 64 than to 8 of 1,024, with centres as without."""
    policy = CachePolicy(sinks=4, recent=8, center=64)
    func = build(shape_of(CASE, policy=policy), target_of("sm_90a"))
    choices = [({"batch": 64, "tiles": 64, "blocks": 32}, SMALL), ({"batch": 8, "tiles": 1024, "blocks": 512}, LARGE)]
    kernel = kernel_by_size(func, choices, partial(attention_decode_cuda, target=target_of("sm_90a")))
    condition = next(each for each in kernel.body.seq if isinstance(each, tvm.tirx.IfThenElse)).condition
    assert "tiles" in str(condition) and "blocks" not in str(condition)
