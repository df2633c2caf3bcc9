"""What ``tvmc tune`` refuses: before the model is imported, and where it can be before TVM is loaded."""

from __future__ import annotations

import socket

import pytest


@pytest.fixture(autouse=True)
def no_user_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def no_import(monkeypatch):
    """Nothing is imported."""

    def imported(*_arguments, **_options):
        raise AssertionError("the model was imported")

    monkeypatch.setattr("rotquant_tvm.cli.tune._imported", imported)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tasks", ","), "--tasks is empty"),
        (("--tasks", "4-2"), "--tasks 4-2: the first number is beyond the last; write it like 2-4"),
        (("--tasks", "atention_decode"), "there is no such operator; did you mean attention_decode"),
        (("--vectors", "iso9"), "unknown KV format 'iso9'"),
        (("--target", "cdua"), "unknown target 'cdua'; did you mean cuda"),
        (("--target", "llvm -mcpu=nonsense"), "unknown CPU -mcpu=nonsense"),
        (("--target", "llvm -mtriple=nonsense"), "unknown machine 'nonsense'"),
        (("--rpc-tracker", "localhost", "--rpc-key", "h100"), "cannot read the RPC tracker 'localhost'"),
        (("--rpc-tracker", "localhost:9190"), "--rpc-tracker and --rpc-key belong together"),
        (("--trials", "0"), "give 1 or more"),
        (("--tuner", "nonsense"), "--tuner was an option of the tvmc of TVM 0.19: it chose one of AutoTVM's searches"),
        (("-o", "FILE/logs"), "-o: cannot write into"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_need_no_model_are_refused_before_there_is_one(tvmc, model, tmp_path, no_import, options, said):
    (tmp_path / "file").write_text("")
    ended = tvmc("tune", model, *(word.replace("FILE", str(tmp_path / "file")) for word in options))
    assert ended.status == 2 and said in ended.error


def test_a_users_folder_that_cannot_be_written(tvmc, model, tmp_path, no_import, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    ended = tvmc("tune", model)
    assert ended.status == 2 and "cannot write into" in ended.error and "tuning_logs" in ended.error
    ended = tvmc("tune", "--tasks", "list", "--heads", 4, "--kv-heads", 2, "--head-dim", 64, "--kv-cache", "hurwitz3")
    assert ended.status == 0, ended.err  # a list writes nothing


def test_a_tracker_that_is_not_there_is_told_before_the_import(tvmc, model, no_import):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    ended = tvmc("tune", model, "--rpc-tracker", f"127.0.0.1:{port}", "--rpc-key", "h100")
    assert ended.status == 3 and f"no RPC tracker answers at 127.0.0.1:{port}" in ended.error
