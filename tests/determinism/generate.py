"""Compile a small model (or load what was compiled), generate, and save the cache: a process of its own.

``python -m tests.determinism.generate MODEL ARTIFACT KV_CACHE TARGET``
Prints JSON: the tokens, a checksum of the saved cache (its codes), and one of every file of the artifact.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from safetensors import safe_open

import rotquant_tvm
from rotquant_tvm.runtime import load

PROMPTS = [list(range(1, 60)), [5, 4, 3]]
TOKENS = 40


def generate(artifact: Path, device: str = "cpu") -> dict[str, object]:
    """Tokens and the cache's bytes of a greedy generation."""
    session = load(artifact, device=device, batch=2, capacity=160)
    logits = session.prefill(PROMPTS)
    tokens = []
    for _ in range(TOKENS):
        tokens.append([int(row) for row in logits.argmax(-1)])
        logits = session.decode(tokens[-1])
    saved = artifact.with_suffix(".cache")
    session.save(saved)
    held = hashlib.sha256()
    with safe_open(saved, framework="np") as stored:  # arrays alone: the library orders the metadata at random
        for name in sorted(stored.keys()):
            held.update(name.encode() + stored.get_tensor(name).tobytes())
    return {"tokens": tokens, "cache": held.hexdigest(), "logits": hashlib.sha256(logits.tobytes()).hexdigest()}


def main() -> None:
    """``generate MODEL ARTIFACT KV_CACHE TARGET``; an artifact that is there already is not compiled again."""
    model, artifact, kv_cache, target = sys.argv[1:]
    path = Path(artifact)
    if not path.exists():
        rotquant_tvm.compile(model, kv_cache, target=target).save(path)
    found = generate(path, "cuda" if target == "cuda" else "cpu")
    found["files"] = {file.name: _checksum(file) for file in sorted(path.iterdir())}
    print(json.dumps(found))


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
