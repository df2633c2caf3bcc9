"""The kernel that rotates a token on its way into the 16-bit segments: against float64, and as machine code."""

from __future__ import annotations

import pytest
from rotquant_tvm.schedules.append_plain_cuda import append_plain_cuda
from rotquant_tvm.schedules.append_turned_cuda import append_turned_kernel
from rotquant_tvm.schedules.gpu_kv_kernels import gpu_kernel

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.ops.site_shape import SiteShape

from ..ops.test_append_plain import KV_HEADS, POLICIES, WORDS, SingleTokens
from ..sampling import sampled
from .cuda_targets import ARCHITECTURES, cubin, target_of
from .simulated_gpu import SimulatedGPU, cuda_target
from .test_dependent_launch_cuda import started_early
from .vector_cases import run, with_gpu

PRESET = CachePolicy(sinks=4, recent=8, center=64)
CASES = [
    ("hurwitz/hurwitz", 64, "float16"),
    ("hurwitz/hurwitz", 80, "float16"),
    ("hurwitz/iso", 96, "bfloat16"),
    ("hurwitz/hurwitz", 128, "float16"),
    ("hurwitz/turbo", 128, "float32"),
    ("turbo/planar", 128, "bfloat16"),
    ("hurwitz/turbo", 256, "float16"),
    ("planar/hurwitz", 256, "float32"),
    ("rotor/iso", 80, "float32"),
    ("none/rotor", 96, "float16"),
    ("rotor/none", 64, "bfloat16"),
]


def shape_of(tokens):
    """The shape that a definition for these tokens carries; what formats it names does not matter."""
    sizes = tokens.kv_heads, tokens.kv_heads, tokens.head_dim
    return SiteShape("f16", "f16", *sizes, 1.0, None, tokens.dtype, policy=tokens.policy.name)


def kernel_of(tokens, target, **knobs):
    """The kernel for the rotations of these tokens."""
    return append_turned_kernel(shape_of(tokens), tokens.structures, target, WORDS, **knobs)


def definition_of(tokens):
    """The definition, carrying its shape."""
    sizes = tokens.kv_heads, tokens.head_dim, WORDS, tokens.dtype, tokens.policy
    return shape_of(tokens).attach(ops.append_plain(*sizes, ops.Axes("cuda"), rotations=tokens.structures))


@pytest.mark.parametrize(("rotations", "head_dim", "dtype", "where"), with_gpu(*CASES))
def test_each_token_enters_its_slot_rotated(rotations, head_dim, dtype, where):
    tokens = SingleTokens(rotations, head_dim, dtype, PRESET, kv_heads=1)
    tokens.check(run(kernel_of(tokens, cuda_target()), where, *tokens.arguments)[0])


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("warps", [1, 4])
def test_any_policy_and_number_of_warps(policy, warps):
    """18 vectors of a role: the last of five blocks has warps without one."""
    tokens = SingleTokens("hurwitz/iso", 64, "float16", policy, kv_heads=KV_HEADS)
    arrays = [array.copy() for array in tokens.arguments]
    SimulatedGPU(kernel_of(tokens, cuda_target(), warps=warps))(*arrays)
    tokens.check(arrays[0])


def test_the_rule_takes_a_definition_that_rotates():
    tokens = SingleTokens("hurwitz/rotor", 128, "float16", PRESET)
    func = definition_of(tokens)
    kernel = gpu_kernel(func, target_of("sm_90a"))
    assert [p.name for p in kernel.params] == [p.name for p in func.params]
    assert "rotation_k" in [p.name for p in kernel.params]


DECLINED = [("dense/hurwitz", 64), ("hurwitz/dense", 64), ("turbo/turbo", 512)]


@pytest.mark.parametrize(("rotations", "head_dim"), DECLINED)
def test_rotations_that_warps_do_not_hold_are_declined(rotations, head_dim):
    tokens = SingleTokens(rotations, head_dim, "float16", PRESET, kv_heads=1)
    assert kernel_of(tokens, target_of("sm_90a")) is None
    assert append_plain_cuda(definition_of(tokens), target_of("sm_90a")) is None


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_starts_early_on_new_gpus(arch, monkeypatch):
    kernel = kernel_of(SingleTokens("hurwitz/hurwitz", 128, "float16", PRESET), target_of(arch))
    kernel = kernel.with_attr("global_symbol", "kernel")
    assert started_early(kernel, target_of(arch), monkeypatch) == (arch == "sm_90a")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", sampled(CASES, CASES[3:5]), ids=lambda case: "-".join(map(str, case)))
def test_it_becomes_machine_code(arch, case):
    tokens = SingleTokens(*case, PRESET)
    assert cubin(lambda target: kernel_of(tokens, target), arch)
