"""``examples/decode_cache.py`` over a session's cache, and what the package's own codecs find in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from rotquant_tvm.formats.centre import decode_centre

from .stored_codes import stored

PROGRAM = Path(__file__).parents[1] / "examples" / "decode_cache.py"
BLOCKED = """
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rotquant_tvm", "tvm", "tvm_ffi", "torch"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def check(compiled, session, folder: Path) -> None:
    """Save the model and what its session holds, decode that in a process without the package, and compare."""
    compiled.save(folder / "model.rq")
    session.save(folder / "prefix.kv")
    words = [sys.executable, "-c", BLOCKED, PROGRAM, folder / "model.rq", folder / "prefix.kv", folder / "found.npz"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = np.load(folder / "found.npz")
    layers = range(len(session.library.info.layers))
    assert sorted(found.files) == sorted(f"{role}_{layer}" for layer in layers for role in "kv")
    for layer in layers:
        for role, wanted in zip("kv", expected(compiled, session, layer), strict=True):
            assert np.isfinite(wanted).any()
            np.testing.assert_allclose(found[f"{role}_{layer}"], wanted, rtol=1e-4, atol=1e-5)


def expected(compiled, session, layer: int) -> list[np.ndarray]:
    """Keys and values of a layer by the package's own codecs, [batch, kv_heads, tokens, d]; NaN behind an end."""
    layers, lengths = session.library.info.layers, session.lengths
    info, policy = layers[layer], layers[layer].policy
    codecs = compiled.config.codecs(layer, len(layers), info.head_dim)
    at = sum(1 + one.policy.segmented + bool(one.policy.center) for one in layers[:layer])
    arrays = [tensor.numpy() for tensor in session.cache.layers]
    shape = (len(lengths), info.kv_heads, int(lengths.max()), info.head_dim)
    found = [np.full(shape, np.nan) for _ in codecs]
    for row, length in enumerate(lengths):
        packed = int(session.cache._packed[row]) if policy.segmented else length
        for role, codec in enumerate(codecs):
            if packed:
                rotated = codec.decode_rotated(_stored(arrays[at], codecs, packed, row)[role])[0]
                if role == 0 and policy.center:
                    rotated += np.repeat(decode_centre(arrays[at + 1][row]), policy.center, axis=1)[:, :packed]
                found[role][row, :, policy.sinks : policy.sinks + packed] = codec.unrotate(rotated)
            if policy.segmented:
                for token in [*range(min(policy.sinks, length)), *range(policy.sinks + packed, length)]:
                    slot = token if token < policy.sinks else policy.sinks + (token - policy.sinks) % policy.ring
                    plain = arrays[at + 1 + bool(policy.center)][row, :, role, slot]
                    found[role][row, :, token] = codec.unrotate(plain.astype(np.float64))
    return found


def _stored(words, codecs, tokens, row):
    array = SimpleNamespace(numpy=lambda: words)
    return stored(SimpleNamespace(cache=SimpleNamespace(layers=[array])), 0, codecs, 0, tokens, row)
