"""The short examples run as they are and say what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *words) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_tensors():
    from rotquant_tvm.formats import KVFormat

    said = run("torch_tensors.py", "--head-dim", "64", "--format", "iso3")
    found = re.search(r"([\d.]+) bits per element, relative squared error ([\d.]+)", said)
    codec = KVFormat.parse("iso3").codec(64, seed=0)
    assert float(found[1]) == codec.bits_per_element and 0.02 < float(found[2]) < 0.05
    assert "torch.uint8 (2, 8, 1024, 64) on cpu" in said
