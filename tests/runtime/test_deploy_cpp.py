"""``examples/deploy_cpp``: built against the installed packages, it continues prompts as a session in Python does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "examples" / "deploy_cpp"
PROMPT = [72, 101, 108, 108, 111]

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs cmake and g++"
)


def build(folder: Path, *options: str) -> Path:
    configure = ["cmake", "-S", SOURCE, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", *options]
    for command in (configure, ["cmake", "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "rotquant_generate"


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("deploy_cpp"), "-DCMAKE_BUILD_TYPE=Debug")


def run(program, *words, **environment):
    command = [str(word) for word in (program, *words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment or None)


def tokens_of(done) -> list[int]:
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.strip().split(",") if word]


def listed(ids) -> str:
    return ",".join(map(str, ids))


@pytest.mark.parametrize(("prompt", "capacity"), [(PROMPT, 128), (list(range(33, 103)), 80), ([7], 11)])
def test_it_generates_what_the_model_says(program, artifact, fake_model, library, prompt, capacity):
    done = run(program, artifact, "--tokens", listed(prompt), "--max-tokens", 10, "--capacity", capacity)
    assert tokens_of(done) == fake_model.reference_greedy(prompt, 10)
    assert f"KV cache: {library.info.cache_bytes(1, capacity) + 4} bytes" in done.stderr  # and the length


def small_model(folder: Path, kv_cache: str) -> Path:
    """An artifact of a random decoder of two layers, for any CPU with AVX2."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import rotquant_tvm

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder / "model")
    rotquant_tvm.compile(folder / "model", kv_cache, target="llvm -mcpu=x86-64-v3").save(folder / "model.rq")
    return folder / "model.rq"


@pytest.mark.slow
def test_it_generates_what_a_session_in_python_generates(program, tmp_path):
    """Of a compiled decoder, through prefill, flushes and a ring."""
    from rotquant_tvm.runtime import load

    place = small_model(tmp_path, "rq3")
    done = run(program, place, "--tokens", listed(range(1, 90)), "--max-tokens", 70, "--capacity", 200)
    (expected,) = load(place, batch=1, capacity=200).generate([list(range(1, 90))], 70)
    assert tokens_of(done) == list(expected.ids) and len(expected.ids) == 70


def test_a_long_prompt_goes_in_chunks(program, artifact, fake_model):
    prompt = [33 + i * 7 % 90 for i in range(1100)]
    done = run(program, artifact, "--tokens", listed(prompt), "--max-tokens", 2, "--capacity", 1101)
    assert tokens_of(done) == fake_model.reference_greedy(prompt, 2)


def test_an_end_token_ends_it(program, write, fake_model, tmp_path):
    from rotquant_tvm.runtime import TokenizerSpec

    said = fake_model.reference_greedy(PROMPT, 4)
    place = write(tmp_path / "ending.rq", tokenizer=TokenizerSpec((said[2],)))
    assert tokens_of(run(program, place, "--tokens", listed(PROMPT))) == said[: said.index(said[2])]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "usage:"),
        (("ARTIFACT", "--tokens", "1,x"), "'x' is no number"),
        (("ARTIFACT", "--tokens", "1", "--max-tokens", "0"), "'0' is no number"),
        (("ARTIFACT", "--tokens", "1", "--fast", "1"), "unknown option --fast"),
        (("ARTIFACT", "--tokens", "1,2,3", "--capacity", "2"), "holds 2 tokens and 3 are needed"),
        (("ARTIFACT", "--tokens", "1,50000000"), "token id 50000000 is outside the vocabulary (0 to "),
        (("/nowhere", "--tokens", "1"), "manifest.json cannot be read"),
    ],
)
def test_mistakes_are_one_line(program, artifact, words, said):
    done = run(program, *(artifact if word == "ARTIFACT" else word for word in words))
    assert done.returncode == 1 and done.stdout == ""
    assert said in done.stderr and done.stderr.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("manifest.json", b"[]", "no JSON object"),
        ("manifest.json", b"{}", "no usable entry 'version'"),
        ("weights.safetensors", b"", "cannot be mapped"),
        ("weights.safetensors", b"\xff" * 16, "truncated"),
        ("weights.safetensors", b"\x02" + b"\x00" * 7 + b"{}", "no usable entry 'weight_0000'"),
        ("model.so", b"no library", ""),
    ],
)
def test_damaged_artifacts_are_refused(program, artifact, name, content, said):
    (artifact / name).write_bytes(content)
    done = run(program, artifact, "--tokens", "1")
    assert done.returncode == 1 and "error: " in done.stderr and said in done.stderr


def test_a_cpu_that_lacks_something_is_told_what(program, write, tmp_path):
    from rotquant_tvm.runtime import Requirements
    from rotquant_tvm.runtime.requirements import machine_name

    needs = Requirements(machine_name(), "future-cpu", ("avx8192",))
    done = run(program, write(tmp_path / "model.rq", requires=needs), "--tokens", "1")
    assert done.returncode == 1 and "a CPU with avx8192, which this one lacks" in done.stderr


@pytest.mark.full
def test_the_address_sanitizer_finds_nothing(artifact, fake_model, tmp_path):
    program = build(tmp_path / "sanitized", "-DSANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug")
    # TVM's libraries keep their registries to the end, which is no leak of the program's.
    done = run(program, artifact, "--tokens", listed(PROMPT), "--max-tokens", 5, ASAN_OPTIONS="detect_leaks=0")
    assert tokens_of(done) == fake_model.reference_greedy(PROMPT, 5)
    assert "ERROR" not in done.stderr and "runtime error" not in done.stderr
