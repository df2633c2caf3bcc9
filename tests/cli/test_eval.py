"""``tvmc eval`` of the tiny model: what it prints, what it keeps, and what it refuses."""

from __future__ import annotations

import json

import pytest

TEXT = " ".join(f"The {i}th line of a text, with {i * i} words in it." for i in range(60))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def ran(model, text, tmp_path_factory, tvmc_process):
    """One whole evaluation in a process of its own; the folder it worked in, and how it ended."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("eval")
    ended = tvmc_process(*_command(model, text, folder), XDG_CACHE_HOME=str(folder / "cache"))
    assert ended.status == 0, ended.err
    return folder, ended


def _command(model, text, folder):
    return [
        *("eval", model, "--text", text, "--kv-cache", "hurwitz2", "--kv-cache", "hurwitz4"),
        *("--kv-cache", "hurwitz2/hurwitz2"),  # the same once more
        *("--kv-layers", "-1=hurwitz4", "--tokens", 160, "--context", 48, "--prefill", 20, "--batch", 2),
        *("--needle", "180", "--needle-trials", 1, "--layers", "--html", folder / "report.html", "--json"),
    ]


@pytest.mark.slow
def test_a_small_evaluation(model, text, tmp_path, tvmc, monkeypatch):
    """The shortest there is: one configuration beside f16, one protocol."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = ["eval", model, "--text", text, "--kv-cache", "hurwitz2", "--protocol", "every-token"]
    ended = tvmc(*command, "--tokens", 96, "--context", 48, "--json")
    assert ended.status == 0, ended.err
    f16, two = ended.document["protocols"]["every-token"]["rows"]
    assert (f16["kl"], f16["top1_agreement"]) == (0, 1) and two["kl"] > 0 and two["tokens"] == 2 * 47


@pytest.mark.full
def test_one_document_holds_all_that_was_asked_for(ran, model, text):
    folder, ended = ran
    document = ended.document
    labels = ["f16", "hurwitz2 [-1=hurwitz4]", "hurwitz4 [-1=hurwitz4]"]
    assert (document["windows"], document["context"], document["bos"]) == (3, 48, None)
    assert [entry["label"] for entry in document["configurations"]] == labels
    assert document["configurations"][1]["kv_layers"] == {"-1": "hurwitz4"}
    bits = [entry["bits_per_element"]["8192"] for entry in document["configurations"]]
    assert bits[0] == pytest.approx(16, abs=0.1) and bits[1] < bits[2] < 5
    assert list(document["protocols"]) == ["every-token", "generation"]
    for name, tokens in (("every-token", 3 * 47), ("generation", 3 * 27)):
        f16, two, four = document["protocols"][name]["rows"]
        assert [row["label"] for row in (f16, two, four)] == labels and two["tokens"] == tokens
        assert f16["kl"] == 0 and f16["top1_agreement"] == 1 and f16["perplexity_change"] == 0
        assert 0 < four["kl"] < two["kl"] and two["top1_agreement"] < 1
        assert two["perplexity_change"] == pytest.approx(two["perplexity"] / f16["perplexity"] - 1)
    assert document["protocols"]["generation"]["prefill"] == 20
    assert [row["label"] for row in document["needle"]["rows"]] == labels
    errors = [row["layers"] for row in document["layers"]["rows"]]
    assert all(len(layers) == 2 for layers in errors) and errors[1][0]["both"] > errors[2][0]["both"] > 0.02
    assert (folder / "report.html").read_text().count("data:image/svg+xml") == 3


@pytest.mark.full
def test_again_everything_comes_from_the_store(ran, model, text, tvmc, monkeypatch):
    folder, ended = ran
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    store = folder / "cache" / "rotquant_tvm" / "evaluation" / "evaluation.jsonl"
    assert ended.document["results"] == str(store)
    before = store.read_text()
    again = tvmc(*_command(model, text, folder))
    assert again.document == ended.document and store.read_text() == before
    assert "windows" not in again.err and "needles" not in again.err and "capture" not in again.err


@pytest.mark.full
def test_the_tables_show_the_figures(ran, model, text, tvmc, monkeypatch):
    folder, ended = ran
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    shown = tvmc(*_command(model, text, folder)[:-1])
    row = ended.document["protocols"]["every-token"]["rows"][1]
    (line,) = [each for each in shown.out.splitlines() if f"{row['kl']:.5f}" in each and "hurwitz2" in each]
    assert f"{row['perplexity']:.3f}" in line and f"{100 * row['top1_agreement']:.2f} %" in line
    assert "3 windows of 48 tokens" in shown.out and f"wrote {folder / 'report.html'}" in shown.out


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--kv-cache", "iso33"], 2, "iso33"),
        (["--kv-cache", "iso3,sinks=x"], 2, "sinks=x"),
        (["--kv-cache", "iso3,bogus=1"], 2, "bogus"),
        (["--kv-layers", "0=nothing"], 2, "nothing"),
        (["--protocol", "wishful"], 2, "wishful"),
        (["--tokens", "512"], 2, "--context 1024"),
        (["--context", "64", "--prefill", "63"], 2, "--prefill 63"),
        (["--context", "1"], 2, "1 is too small"),
        (["--needle", "512,x"], 2, "'x' is not an integer"),
        (["--html", "."], 2, "--html"),
        (["--dtype", "int8"], 2, "int8"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(tvmc, model, text, options, status, words):
    ended = tvmc("eval", model, "--text", text, *options)
    assert ended.status == status and words in ended.error


@pytest.mark.parametrize(("name", "content"), [("missing", None), ("empty", b""), ("binary", b"\xff\xfe")])
def test_a_text_that_cannot_be_read_is_refused(tvmc, model, tmp_path, monkeypatch, name, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ended = tvmc("eval", model, "--text", tmp_path / name, "--json")
    assert ended.status == 4 and name in ended.error
    assert json.loads(ended.out)["error"]["exit_status"] == 4


def test_a_model_that_is_none_is_refused(tvmc, text, tmp_path):
    ended = tvmc("eval", tmp_path / "nothing.gguf", "--text", text)
    assert ended.status == 4 and "does not exist" in ended.error


def test_the_text_is_required(tvmc, model):
    ended = tvmc("eval", model)
    assert ended.status == 2 and "--text" in ended.error
