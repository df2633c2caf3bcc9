"""``tvmc run`` and ``tvmc inspect`` of the compiled tiny model."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

import rotquant_tvm


@pytest.fixture
def inputs(tmp_path):
    """Two rows, the second of three tokens."""
    path = tmp_path / "in.npz"
    ids = np.random.default_rng(1).integers(0, 256, (2, 9))
    np.savez(path, ids=ids, new_lengths=np.array([9, 3]))
    return path


def test_text_is_what_a_session_generates(tvmc, artifact):
    expected = rotquant_tvm.load(artifact).generate("Hello", 20)
    assert tvmc("run", artifact, "--prompt", "Hello", "--max-tokens", 20).out == expected.text + "\n"
    document = tvmc("run", artifact, "--prompt", "Hello", "--max-tokens", 20, "--json").document
    assert document["ids"] == list(expected.ids) and document["text"] == expected.text
    assert document["capacity"] == 128 and document["finish_reason"] == expected.finish_reason


def test_sampling_chat_and_stop_reach_the_session(tvmc, artifact):
    session = rotquant_tvm.load(artifact)
    sampled = session.generate("Hi", 12, temperature=2.0, top_p=0.9, seed=5, chat=True)
    options = [
        "--prompt",
        "Hi",
        "--chat",
        "--max-tokens",
        12,
        "--temperature",
        2,
        "--top-p",
        0.9,
        "--seed",
        5,
    ]
    document = tvmc("run", artifact, *options, "--json").document
    assert document["ids"] == list(sampled.ids)
    letter = next(character for character in sampled.text if character.isprintable())
    stopped = tvmc("run", artifact, *options, "--stop", letter, "--json").document
    assert stopped["finish_reason"] == "stop" and stopped["text"] == sampled.text.partition(letter)[0]


def test_the_formats_are_said_on_standard_error(tvmc, artifact):
    err = tvmc("run", artifact, "--prompt", "a", "--max-tokens", 1).err
    assert "iso3/planar3" in err and "bits per element" in err and "2 layers" in err


def test_outputs_are_the_logits_of_a_prefill(tvmc, artifact, inputs, tmp_path):
    ended = tvmc("run", artifact, "--inputs", inputs, "--outputs", tmp_path / "out.npz", "--json")
    assert ended.status == 0, ended.err
    stored, given = np.load(tmp_path / "out.npz"), np.load(inputs)
    rows = [given["ids"][0], given["ids"][1][:3]]
    expected = rotquant_tvm.load(artifact, batch=2).prefill(rows)
    np.testing.assert_allclose(stored["logits"], expected, rtol=1e-5, atol=1e-5)
    assert stored["lengths"].tolist() == [9, 3] == ended.document["tokens"]
    assert ended.document["likeliest_next"] == expected.argmax(-1).tolist()
    assert sorted(os.listdir(tmp_path)) == ["in.npz", "out.npz"]


def test_missing_inputs_are_filled(tvmc, artifact, tmp_path):
    np.savez(tmp_path / "lengths.npz", new_lengths=np.array([4, 0, 7]))
    filled = tvmc("run", artifact, "--inputs", tmp_path / "lengths.npz", "--fill-mode", "ones", "--json").document
    expected = rotquant_tvm.load(artifact).prefill([1] * 7).argmax()
    assert filled["tokens"] == [4, 0, 7] and filled["likeliest_next"][1:] == [None, expected]
    assert tvmc("run", artifact, "--json").document["tokens"] == [32]


def test_times_and_kernels(tvmc, artifact):
    ended = tvmc("run", artifact, "--print-time", "--profile", "--repeat", 3, "--number", 2, "--json")
    time, profile = ended.document["time_ms"], ended.document["profile"]
    assert 0 < time["min"] <= time["median"] <= time["max"] and time["min"] <= time["mean"] <= time["max"]
    calls = [entry["calls"] for entry in profile if entry["kernel"].startswith("kv_attention_prefill")]
    assert sum(calls) == 2 and sum(entry["share"] for entry in profile) == pytest.approx(1)
    shown = tvmc("run", artifact, "--prompt", "abc", "--max-tokens", 4, "--print-time", "--profile").out
    assert "decode tokens/s" in shown and "kv_attention_decode" in shown and "execution time (ms)" in shown


def test_a_generation_can_be_measured_and_written(tvmc, artifact, tmp_path):
    options = ["--prompt", "abc", "--max-tokens", 3, "--repeat", 2, "--outputs", tmp_path / "out.npz"]
    document = tvmc("run", artifact, *options, "--json").document
    assert np.load(tmp_path / "out.npz")["ids"].tolist() == document["ids"]
    assert np.load(tmp_path / "out.npz")["prompt_ids"].tolist()[-3:] == [97, 98, 99]


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--chat"], "--chat goes with --prompt"),
        (["--seed", "1"], "--seed"),
        (["--prompt", "a", "--inputs", "x.npz"], "--inputs"),
        (["--prompt", "a", "--fill-mode", "ones"], "--fill-mode"),
        (["--prompt", "a", "--stop", ""], "--stop"),
        (["--prompt", "\udcff"], "UTF-8"),
        (["--outputs", "/"], "--outputs"),
        (["--outputs", "/no/such/folder/y.npz"], "--outputs"),
        (["--device", "tpu"], "'tpu'"),
        (["--device", "cuda"], "compiled for llvm"),
        (["--kv-capacity", "9999"], "256"),
        (["--prompt", "a" * 100, "--kv-capacity", "64"], "--kv-capacity"),
        (["--prompt", "a", "--max-tokens", "300", "--kv-capacity", "256"], "positions end at 256"),
    ],
)
def test_bad_options_are_usage_errors(tvmc, artifact, tmp_path, monkeypatch, options, fragment):
    monkeypatch.chdir(tmp_path)
    ended = tvmc("run", artifact, *options)
    assert ended.status == 2 and ended.out == "" and fragment in ended.error, ended
    assert os.listdir(tmp_path) == []


def bad_inputs():
    """Arrays that are no inputs, by what the error must say."""
    return {
        "ids2": {"ids2": np.zeros((1, 3), int)},
        "float": {"ids": np.zeros((1, 3))},
        "[3]": {"ids": np.zeros(3, int)},
        "[0, 3]": {"ids": np.zeros((0, 3), int)},
        "vocabulary": {"ids": np.array([[1, 258]])},
        "token id -1": {"ids": np.array([[1, -1]])},
        "2 entries": {"ids": np.zeros((1, 3), int), "new_lengths": np.array([1, 1])},
        "asks for 4": {"ids": np.zeros((1, 3), int), "new_lengths": np.array([4])},
        "not all 0": {"new_lengths": np.array([0, 0])},
        "0 or more": {"new_lengths": np.array([-1, 2])},
    }


def test_bad_input_files_are_refused(tvmc, artifact, tmp_path):
    output = tmp_path / "out" / "y.npz"
    output.parent.mkdir()
    for fragment, arrays in bad_inputs().items():
        np.savez(tmp_path / "x.npz", **arrays)
        ended = tvmc("run", artifact, "--inputs", tmp_path / "x.npz", "--outputs", output)
        assert ended.status == 4 and ended.out == "" and fragment in ended.error, (fragment, ended)
    np.save(tmp_path / "single.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", ids=np.array([[{}]], dtype=object))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:60])
    for name in ("single.npy", "objects.npz", "text.npz", "cut.npz", "missing.npz"):
        ended = tvmc("run", artifact, "--inputs", tmp_path / name, "--outputs", output)
        assert ended.status == 4 and name in ended.error, ended
    assert os.listdir(output.parent) == []


def test_damaged_artifacts_are_refused_by_run_and_inspect(tvmc, artifact, tmp_path):
    def damaged(name, change):
        shutil.copytree(artifact, tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def flip(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def cut(path):
        path.write_bytes(path.read_bytes()[:-7])

    cases = {
        "model.so": damaged("flipped", lambda folder: flip(folder / "model.so")),
        "weights.safetensors": damaged("cut", lambda folder: cut(folder / "weights.safetensors")),
        "manifest.json": damaged("no-manifest", lambda folder: (folder / "manifest.json").unlink()),
        "not valid JSON": damaged("bad-manifest", lambda folder: cut(folder / "manifest.json")),
        "tokenizer.json": damaged("no-tokenizer", lambda folder: (folder / "tokenizer.json").unlink()),
    }
    for fragment, folder in cases.items():
        for command in ("run", "inspect"):
            ended = tvmc(command, folder)
            assert ended.status == 4 and ended.out == "" and fragment in ended.error, (command, ended)
    (tmp_path / "file").write_text("x")
    for path in ("file", "nowhere"):
        assert tvmc("run", tmp_path / path).status == 4


def test_inspect_shows_an_artifact(tvmc, compiled):
    document = tvmc("inspect", compiled.artifact, "--json").document
    assert document["report"] == compiled.ended.document["report"]
    assert sorted(document["files"]) == ["codecs.safetensors", "model.so", "tokenizer.json", "weights.safetensors"]
    assert document["model"]["kv_layers"] == {"-1": "hurwitz4:ip/hurwitz4"} and document["requires"]["cuda"] is None
    assert document["codecs"]["layers"][0]["k"]["format"] == "iso3" and document["tuning_records"] == []
    assert [layer["k"] for layer in document["kv_cache_info"]["layers"]] == ["iso3", "hurwitz4:ip"]
    shown = tvmc("inspect", compiled.artifact).out
    assert "iso3" in shown and "128 (at most 256)" in shown and "llvm" in shown
    assert "CPU" in shown and "tvm-ffi 0.1" in shown


def test_inspect_shows_the_attention_of_a_model(tvmc, model):
    document = tvmc("inspect", model, "--json").document
    assert document["model_type"] == "llama" and document["tokenizer"]
    assert [(site["verdict"], site["heads"], site["kv_heads"], site["head_dim"]) for site in document["sites"]] == [
        ("quantize", 2, 1, 32)
    ] * 2
    assert "2 of 2 attention sites" in tvmc("inspect", model).out
