"""The C++ program under AddressSanitizer and Valgrind: damaged artifacts, leaks, and the kernels of a real model."""

from __future__ import annotations

import os
import random
import shutil
import subprocess

import pytest

from ..runtime.test_deploy_cpp import PROMPT, build, listed, small_model, tokens_of

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs cmake and g++"),
]
INPUTS = int(os.environ.get("FUZZ_EXAMPLES", 600))


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """The program with AddressSanitizer and UndefinedBehaviorSanitizer."""
    return build(tmp_path_factory.mktemp("sanitized"), "-DSANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug")


def run(command, **environment):
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=300, env=environment)


def sound(done) -> bool:
    """Whether no sanitizer has said anything."""
    return not any(word in done.stderr for word in ("Sanitizer", "runtime error", "Segmentation"))


def test_nothing_leaks(sanitized, artifact, fake_model):
    """Not of the program, and not of TVM's runtime either: nothing needs to be left out."""
    done = run([sanitized, artifact, "--tokens", listed(PROMPT), "--max-tokens", 5], ASAN_OPTIONS="detect_leaks=1")
    assert sound(done), done.stderr[-3000:]
    assert tokens_of(done) == fake_model.reference_greedy(PROMPT, 5)


def test_damaged_files_are_one_error(sanitized, artifact):
    """Every damaged manifest and header of weights ends in an error line, or in tokens where it does not matter."""
    numbers = random.Random(7)
    pieces = (
        b"null",
        b"-1",
        b"1e999",
        b"9" * 400,
        b"[" * 2000,
        b'{"a":' * 2000,
        b'"\\ud800"',
        b"\xff",
        b"",
        b"18446744073709551616",
    )
    files = {name: (artifact / name).read_bytes() for name in ("manifest.json", "weights.safetensors")}
    refused = 0
    for number in range(INPUTS):
        name = ("manifest.json", "weights.safetensors")[number % 2]
        data = bytearray(files[name])
        head = len(data) if name == "manifest.json" else 300
        for _ in range(numbers.randint(1, 3)):
            place, length = numbers.randrange(min(head, max(1, len(data)))), numbers.randrange(12)
            kind = numbers.randrange(5)
            if kind == 0 and place < len(data):
                data[place] ^= 1 << numbers.randrange(8)
            elif kind == 1:
                data[place : place + length] = numbers.choice(pieces)
            elif kind == 2:
                del data[place:]
            elif kind == 3:
                data[:8] = numbers.randbytes(8)
            else:
                data[place : place + length] = numbers.randbytes(length)
        (artifact / name).write_bytes(data)
        done = run([sanitized, artifact, "--tokens", "1", "--max-tokens", 1], ASAN_OPTIONS="detect_leaks=0")
        (artifact / name).write_bytes(files[name])
        assert sound(done) and done.returncode in (0, 1), (bytes(data)[:2000], done.returncode, done.stderr[-2000:])
        assert done.returncode == 0 or "error: " in done.stderr, (bytes(data)[:2000], done.stderr[-2000:])
        refused += done.returncode
    assert refused > INPUTS // 2


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.parametrize("kv_cache", ["rq3", "iso4/q8_0", "hurwitz3+tcq"])
def test_kernels_of_a_real_model_touch_only_what_is_theirs(kv_cache, tmp_path):
    """Prefill and decode of a compiled decoder in Valgrind: no access outside, no branch on what was never written."""
    artifact = small_model(tmp_path, kv_cache)
    program = build(tmp_path / "plain", "-DCMAKE_BUILD_TYPE=Debug")
    command = [program, artifact, "--tokens", listed(range(1, 90)), "--max-tokens", 70, "--capacity", 200]
    plain = run(command, TVM_NUM_THREADS="1")
    checked = run(
        ["valgrind", "--quiet", "--error-exitcode=99", "--undef-value-errors=yes", *command],
        TVM_NUM_THREADS="1",
        PATH=os.environ["PATH"],
    )
    assert checked.returncode == 0, checked.stderr[-4000:]
    assert tokens_of(checked) == tokens_of(plain) and len(tokens_of(plain)) == 70
