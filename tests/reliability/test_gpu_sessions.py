"""Sessions on a GPU: memory that ends, broken activations, threads, and a thousand of them one after the other."""

from __future__ import annotations

import gc
import re
from functools import cache

import numpy as np
import pytest
import tvm

from rotquant_tvm.errors import DeviceError

from .session_checks import CHECKS, tokens
from .tiny_sessions import POLICY, model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not tvm.cuda(0).exist, reason="no CUDA device")]
HUGE = 1 << 20
"""The model's positions."""


@cache
def library(kv_cache: str):
    """A tiny model whose heads the GPU's own kernels take."""
    return model(kv_cache, "cuda", head_dim=64).library("cuda")


def used_bytes() -> int:
    torch = pytest.importorskip("torch")
    gc.collect()
    library(POLICY).device.sync()
    free, total = torch.cuda.mem_get_info()
    return total - free


def step_logits(session, seed: int = 1) -> np.ndarray:
    """What a session gives for a prompt of 50 tokens and 20 more."""
    ids = tokens(seed, session.batch, 70)
    return np.array([session.prefill(ids[:, :50]), *(session.decode(column) for column in ids[:, 50:].T)])


@pytest.mark.parametrize("kv_cache", [POLICY, "f16"])
@pytest.mark.parametrize("check", CHECKS)
def test_sessions(kv_cache, check):
    CHECKS[check](library(kv_cache))


def first_tokens_of_all_that_fits(made, batch: int, capacity: int) -> np.ndarray:
    """Fill most of the device with one cache, of which there can be no copy, and use it."""
    session = made.session(batch=batch, capacity=capacity)
    for call, what in ((session.fork, "copy"), (lambda: session.reorder(list(range(batch))), "reorder")):
        expected = rf"cannot {what} the KV cache: [\d.]+ GiB are needed and [\d.]+ [MG]iB are free \(.*out of memory\)"
        with pytest.raises(DeviceError, match=expected):
            call()
    rows = np.tile(tokens(1, 4, 70)[:, :50], (-(-batch // 4), 1))[:batch]
    return np.argmax(session.prefill(rows), 1)


def test_a_cache_that_does_not_fit_names_one_that_does():
    made = library("f16")
    batch = 4 + 2 * made.device.available_global_memory // made.info.cache_bytes(1, HUGE)
    before = step_logits(made.session(batch=4))
    with pytest.raises(DeviceError) as error:
        made.session(batch=batch, capacity=HUGE)
    found = re.search(r"takes ([\d.]+) GiB and [\d.]+ GiB are free: capacity (\d+) would fit", str(error.value))
    assert found and abs(float(found[1]) - made.info.cache_bytes(batch, HUGE) / 2**30) < 0.1, error.value
    first = first_tokens_of_all_that_fits(made, batch, int(found[2]))
    np.testing.assert_array_equal(first[:4], np.argmax(before[0], 1))
    gc.collect()
    np.testing.assert_array_equal(step_logits(made.session(batch=4)), before)


def test_memory_that_another_library_holds():
    """And it can go on allocating after we were refused."""
    torch = pytest.importorskip("torch")
    made = library("f16")
    before = step_logits(made.session(batch=4))
    held = torch.empty(torch.cuda.mem_get_info()[0] - (600 << 20), dtype=torch.uint8, device="cuda")
    batch = 1 + (1 << 30) // made.info.cache_bytes(1, HUGE)
    with pytest.raises(DeviceError, match=r"and \d+\.\d MiB are free: capacity \d+ would fit"):
        made.session(batch=batch, capacity=HUGE)
    assert torch.ones(1 << 16, device="cuda").sum().item() == 1 << 16
    np.testing.assert_array_equal(step_logits(made.session(batch=4)), before)
    del held
    torch.cuda.empty_cache()


def test_a_thousand_sessions_leave_nothing(tmp_path):
    """Their decode steps recorded, some copied, saved and restored."""

    def cycle(count):
        session = library(POLICY).session(batch=1 + count % 3, capacity=128 + 8 * count)
        session.prefill([[1, 2, 3]] * session.batch)
        if count % 10 == 0:
            session.reorder([0, 0])
            session.fork().save(tmp_path / "prefix.kv")
            library(POLICY).restore(tmp_path / "prefix.kv").decode([1, 2])
        for _ in range(4):
            session.decode([4] * session.batch)

    for count in range(0, 1000, 9):
        cycle(count)
    before = used_bytes()
    for count in range(1000):
        cycle(count)
    assert used_bytes() <= before + (8 << 20)
