"""The same input gives the same codes and tokens: run again, in other threads and processes, compiled again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rotquant_tvm.formats import KVFormat

from ..ops.conftest import has_gpu
from ..sampling import sampled
from .device_codes import DTYPES, FORMATS, compare, counted, vectors
from .split_counts import CASES, SPLITS, attend, difference

ROOT = Path(__file__).parents[2]
ROUNDING = {"trellis": 2e-5, "linear": 1e-3}
"""How far from a boundary a code may differ: float32 sums of 128 products. Of a linear format, in steps; of a trellis,
how much worse the squared error may be."""
requires_gpu = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="no CUDA device")]
KINDS = ["llvm", pytest.param("cuda", marks=requires_gpu)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", sampled(DTYPES, ["float16"]))
@pytest.mark.parametrize("text", sampled(FORMATS, ["hurwitz3:ip"]))
def test_codes_differ_from_float64_only_within_rounding_of_a_boundary(text, dtype, kind):
    kind_of_book = "trellis" if "+tcq" in text else "linear" if text.startswith("q") else ""
    for count in compare(text, dtype, kind, 256 if "+tcq" in text else 1024 if kind == "llvm" else 4096):
        assert count.repeated, count
        assert count.farthest <= ROUNDING.get(kind_of_book, 4e-6), count
        assert count.differing <= max(2 * 128, 2e-3 * count.codes), count
        assert count.moved <= max(2, 0.01 * count.gains), count


def test_a_code_that_is_wrong_is_counted():
    codec, x = KVFormat.parse("iso3").codec(128, 1), vectors("float32", 20)
    exact = codec.encode(x)
    wrong = codec.encode(x * (1 + 0.01 * np.random.default_rng(0).standard_normal(x.shape)))
    count = counted(codec, x, (wrong, exact), "noisy")
    assert count.differing > 20 and count.farthest > 1e-5 and count.moved > 0 and not count.repeated
    count = counted(codec, x, (exact, exact), "exact")
    assert (count.differing, count.farthest, count.moved, count.repeated) == (0, 0.0, 0, True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", sampled(CASES, CASES[-1:]), ids=str)
def test_attention_does_not_depend_on_the_number_of_splits(case, kind):
    tiles = 24 if kind == "llvm" else 256
    (one, repeated), *others = [attend(case, splits, kind, tiles) for splits in (SPLITS if kind == "cuda" else (1, 7))]
    assert repeated and all(same for _, same in others)
    assert max(difference(one, other) for other, _ in others) < 1e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small decoder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256},
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


def generated(model, artifact, kv_cache, target="llvm", threads=1):
    """What a process of its own gives."""
    command = [sys.executable, "-m", "tests.determinism.generate", str(model), str(artifact), kv_cache, target]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TVM_NUM_THREADS": str(threads)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full
@pytest.mark.parametrize("kv_cache", ["rq3", "iso4/q8_0", "hurwitz3+tcq"])
def test_tokens_and_codes_are_the_same_in_every_process(model, tmp_path, kv_cache):
    first = generated(model, tmp_path / "one.rq", kv_cache)
    assert len(first["tokens"]) == 40 and len({tuple(row) for row in first["tokens"]}) > 3
    assert generated(model, tmp_path / "one.rq", kv_cache, threads=2) == first
    again = generated(model, tmp_path / "two.rq", kv_cache, threads=2)
    assert {name: again[name] for name in ("tokens", "cache", "logits")} == {
        name: first[name] for name in ("tokens", "cache", "logits")
    }
    for name in ("weights.safetensors", "model.so"):
        assert again["files"][name] == first["files"][name], f"{name} of the second compile differs"


@pytest.mark.full
@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no CUDA device")
@pytest.mark.parametrize("kv_cache", ["rq3", "iso4/q8_0"])
def test_tokens_and_codes_are_the_same_in_every_process_on_a_gpu(model, tmp_path, kv_cache):
    first, again = (generated(model, tmp_path / "one.rq", kv_cache, "cuda") for _ in range(2))
    assert again == first
