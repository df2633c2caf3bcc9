"""``tvmc tune``: its tasks, what it refuses, and a real run whose log a compile then uses."""

from __future__ import annotations

import os

import pytest
import tvm

SMALL = ("--heads", 4, "--kv-heads", 2, "--head-dim", 64, "--kv-cache", "hurwitz3", "--shapes", "1x1K")
QUICK = ("--trials-per-task", 2, "--number", 1, "--repeat", 2, "--min-repeat-ms", 0, "--parallel", 1)


@pytest.fixture(autouse=True)
def no_user_logs(tmp_path, monkeypatch):
    """No test sees or writes the user's own logs."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def names(tvmc, *arguments):
    ended = tvmc("tune", "--tasks", "list", "--json", *arguments)
    assert ended.status == 0, ended.err
    return [task["name"] for task in ended.document["tasks"]]


def test_help_names_every_option(tvmc):
    options = "--trials --trials-per-task --number --repeat --min-repeat-ms --timeout --parallel --early-stopping"
    options += " --time-budget --tasks --rpc-tracker --rpc-key --target -o --output --shapes --heads --kv-heads"
    options += " --head-dim --json"
    text = tvmc("tune", "--help").out
    assert [option for option in options.split() if option not in text] == []


def test_tasks_of_an_attention(tvmc):
    assert "attention_decode hurwitz3 4/2x64 float32 1x1K" in names(tvmc, *SMALL)
    several = [name for name in names(tvmc) if name.startswith("attention_decode")]
    assert len(several) == 8 and {name.split()[1] for name in several} == {
        "hurwitz2",
        "hurwitz3",
        "hurwitz4",
        "hurwitz3:ip/hurwitz3",
    }


def test_tasks_of_a_model(tvmc, model):
    """The KV operators and the rest of the model: linear layers, norms and other loops."""
    found = names(tvmc, model, "--kv-cache", "iso3", "--shapes", "2x256")
    assert found[0] == "attention_decode iso3 2/1x32 float32 2x256"
    linear = [name for name in found if name.startswith("linear") and name.endswith("2x256")]
    assert linear == [
        "linear 64→64+32+32 float32 2x256",
        "linear 64→64 residual float32 2x256",
        "linear 64→96+96 float32 2x256",
        "linear 96→64 residual float32 2x256",
        "linear 64→258 float32 2x256",
    ]
    assert any(name.startswith("loops ") and "rsqrt" in name and name.endswith("2 +256") for name in found)


@pytest.mark.full
def test_a_configuration_is_enough(tvmc, model, tmp_path):
    """Weights are not needed to know their shapes."""
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    found = names(tvmc, tmp_path, "--kv-cache", "iso3", "--shapes", "2x256")
    assert {"attention_decode iso3 2/1x32 float32 2x256", "linear 64→96+96 float32 2x256"} <= set(found)


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "no such model"}', "[]"])
def test_a_configuration_that_is_none(tvmc, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    ended = tvmc("tune", tmp_path, "--tasks", "list")
    assert ended.status == 4 and str(tmp_path) in ended.error


def test_tasks_of_a_gpu_that_is_not_here(tvmc):
    ended = tvmc("tune", "--tasks", "list", "--target", "cuda -arch=sm_90a", "--json", "--vectors", "hurwitz3")
    tasks = ended.document["tasks"]
    assert {task["rule"] for task in tasks} >= {"attention_decode_cuda"}
    assert all(task["knobs"] and task["bucket"] for task in tasks)


def test_the_list_as_a_table(tvmc):
    ended = tvmc("tune", "--tasks", "list", *SMALL)
    assert "attention_decode hurwitz3 4/2x64 float32 1x1K" in ended.out and "splits: 6" in ended.out


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--kv-cache", "iso9"), "iso4"),
        (("--heads", 6, "--kv-heads", 4), "6 heads are no multiple of 4"),
        (("--shapes", "8by8"), "8x32K"),
        (("--trials-per-task", 0), "1 or more"),
        (("--min-repeat-ms", -1), "from 0"),
        (("--timeout", 0), "above 0"),
        (("--time-budget", 0), "above 0"),
        (("--rpc-tracker", "host:9190"), "--rpc-key"),
        (("--rpc-key", "h100"), "--rpc-tracker"),
        (("--target", "vulkan"), "llvm or cuda"),
        (("--tasks", "no such kernel", *SMALL), "no task has that in its name"),
        (("--tasks", "77", *SMALL), "there are tasks 0 to"),
        (("--vectors", "iso9"), "iso9"),
        (("--head-dim", 24), "head_dim 24"),
    ],
)
def test_bad_options_are_refused(tvmc, tmp_path, arguments, fragment):
    ended = tvmc("tune", "-o", tmp_path / "logs", *arguments)
    assert ended.status == 2 and fragment in ended.error and not (tmp_path / "logs").exists()


def test_the_heads_of_a_model_are_its_own(tvmc, model):
    ended = tvmc("tune", model, "--heads", 8)
    assert ended.status == 2 and "--heads is for tuning without MODEL" in ended.error


def test_what_is_no_model_is_refused(tvmc, tmp_path):
    assert tvmc("tune", tmp_path / "nothing").status == 4


def test_cuda_without_a_gpu_is_a_device_failure(tvmc):
    if tvm.cuda().exist:
        pytest.skip("there is a CUDA device here")
    ended = tvmc("tune", "--target", "cuda -arch=sm_90a")
    assert ended.status == 3 and "--tasks list and --rpc-tracker" in ended.error


def test_an_rpc_tracker_needs_a_package(tvmc, monkeypatch):
    monkeypatch.setattr("rotquant_tvm.tuning.remote_measuring.importlib.util.find_spec", lambda _name: None)
    ended = tvmc("tune", *SMALL, "--rpc-tracker", "localhost:9190", "--rpc-key", "cpu")
    assert ended.status == 2 and "pip install 'rotquant-tvm[rpc]'" in ended.error


def test_a_kernel_without_knobs_is_nothing_to_tune(tvmc):
    ended = tvmc("tune", *SMALL[:-4], "--kv-cache", "hurwitz3", "--tasks", "all", "--target", "cuda -arch=sm_50")
    assert ended.status in (2, 3)


@pytest.mark.full
def test_a_run_its_log_and_the_compile_that_uses_it(tvmc_process, tvmc, model, tmp_path):
    logs = tmp_path / "logs"
    options = ("--kv-cache", "hurwitz3", "--shapes", "1x256", *QUICK, "--tuning-records", logs, "--json")
    options += ("--tasks", "attention_decode,linear 96,rsqrt")
    ended = tvmc_process("tune", model, *options)
    assert ended.status == 0, ended.err
    assert ended.document["measured"] == 6 and ended.document["failures"] == [] and ended.document["finished"]
    record, *others = ended.document["records"]
    assert record["operator"] == "attention_decode" and record["trials"] == 2
    assert [other["operator"] for other in others] == ["loops", "linear"] and others[1]["flops"] > 0
    for each in ended.document["records"]:
        assert each["gain"] == each["rule_seconds"] / each["seconds"] >= 1 and 0 < each["share"]
    lines = [line for line in ended.err.splitlines() if line.startswith("task ")]
    assert len(lines) >= 3 and all(" of 3, " in line and " of the roofline, about " in line for line in lines)
    assert tvmc("logs", "check", logs).status == 0

    again = tvmc_process("tune", model, *options)
    assert again.document["measured"] == 0 and again.document["records"] == ended.document["records"]

    artifact = tmp_path / "a.rq"
    compiled = tvmc("compile", model, "--kv-cache", "hurwitz3", "--tuning-records", logs, "-o", artifact, "--json")
    assert compiled.status == 0, compiled.err
    report = compiled.document["report"]
    sources = {kernel["operator"]: kernel["source"] for kernel in report["layers"][0]["kernels"]}
    chosen = ", ".join(f"{name}={value}" for name, value in record["knobs"].items()) or "the rule's own knobs"
    assert sources["attention_decode"] == f"record: {os.path.basename(ended.document['folder'])}, 1x256: {chosen}"
    assert sources["append"] == "rule: definition" and report["warnings"] == []
    assert f"1x256: {chosen}" in tvmc("inspect", artifact).out
