"""``examples/deploy_python``: generates, saves what it holds and goes on from there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "examples" / "deploy_python" / "generate.py"


def run(*words) -> list[str]:
    done = subprocess.run([sys.executable, PROGRAM, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_saved_prefix_is_gone_on_from(artifact, fake_model, tmp_path):
    first = run(artifact, "hello", "--max-tokens", 4, "--save", tmp_path / "prefix.kv")
    said = fake_model.reference_greedy(b"hello", 4)
    assert first[0] == bytes(said).decode() and first[1].startswith("8 tokens in a cache of ")
    second = run(artifact, "xy", "--max-tokens", 3, "--prefix", tmp_path / "prefix.kv")
    held = [*b"hello", *said[:3], *b"xy"]  # the last token was not fed
    assert second[0] == bytes(fake_model.reference_greedy(held, 3)).decode()
    assert second[1].startswith(f"{len(held) + 2} tokens")
