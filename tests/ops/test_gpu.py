"""What only a GPU shows: races between the lanes of a block, streams, large grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rotquant_tvm import ops

from .cases import CASES, MIXED
from .conftest import Kernels, has_gpu
from .reference import check_output, codec_of, filled_cache, layout_of, random_words, stored_kv

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="no CUDA device")]

REPEATS = 20


@pytest.fixture(scope="module")
def gpu() -> Kernels:
    """The operators on the GPU."""
    return Kernels("cuda")


@pytest.mark.parametrize("case", [MIXED, CASES[4], CASES[9]], ids=str)
def test_append_is_the_same_every_time(gpu, rng, case):
    """Many tiles at once; a missing barrier gives other bits now and then."""
    batch, tokens = 16, 200
    layout = layout_of(case.codecs)
    cache = random_words(rng, layout, (batch, case.kv_heads, 8))
    k, v = (rng.standard_normal((batch, case.kv_heads, tokens, case.head_dim)).astype("float32") for _ in "kv")
    rotations = [codec.coefficients for codec in case.codecs]
    new = rng.integers(0, tokens + 1, batch).astype(np.int32)
    lengths = new + rng.integers(0, 56, batch).astype(np.int32)
    kernel = gpu.build(ops.append, *case.codecs, case.kv_heads, "float32")
    results = [gpu.run(kernel, cache, k, v, *rotations, lengths, new, writes=(0,)) for _ in range(REPEATS)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("case", [CASES[0], CASES[8]], ids=str)
def test_attention_is_the_same_every_time_and_right_for_long_sequences(gpu, rng, poisoned, case):
    lengths = rng.integers(1, 4096, 8).astype(np.int32)
    cache = filled_cache(rng, case.codecs, case.kv_heads, 128, lengths)
    q = rng.standard_normal((8, 1, case.heads, case.head_dim)).astype("float32")
    scale = case.head_dim**-0.5
    arguments = (*case.codecs, case.heads, case.kv_heads, scale, "float32")
    kernel = gpu.build(ops.attention_decode, *arguments, splits=64 // case.kv_heads)
    out = poisoned(q.shape, "float32")
    results = [gpu.run(kernel, q, cache, lengths, out, writes=(3,)) for _ in range(REPEATS)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    keys, values = stored_kv(case.codecs, cache)
    group = case.heads // case.kv_heads
    for b, n in enumerate(lengths):
        k, v = (torch.tensor(x[b, :, :n]).repeat_interleave(group, 0) for x in (keys, values))
        scores = torch.einsum("hd,hnd->hn", torch.tensor(q[b, 0]).double(), k) * scale
        check_output(results[0][b, 0], torch.einsum("hn,hnd->hd", scores.softmax(-1), v).numpy())


def test_kernels_follow_torchs_stream(gpu):
    codec = codec_of("rq3", 128).compile(gpu.target)
    x = torch.randn(4096, 128, device="cuda")
    expected = codec.roundtrip(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # what follows must wait for it
            late = torch.zeros_like(x)
            late.copy_(x)
            found = codec.roundtrip(late)
        stream.synchronize()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_many_rows(gpu):
    """More rows than a grid's other axes could hold."""
    codec = codec_of("planar3:mse", 96)
    x = torch.randn(300_000, 96, device="cuda")
    error = (codec.compile(gpu.target).roundtrip(x) - x).pow(2).sum() / x.pow(2).sum()
    sample = x[:4000].cpu().numpy()
    exact = ((codec.decode(codec.encode(sample)) - sample) ** 2).sum() / (sample**2).sum()
    assert float(error) == pytest.approx(exact, rel=0.02)
