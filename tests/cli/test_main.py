"""The grammar, its help, and how commands end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import rotquant_tvm
from rotquant_tvm.cli.main import COMMANDS
from rotquant_tvm.errors import DeviceError, ModelError


def test_help_names_every_command(tvmc):
    ended = tvmc("--help")
    assert ended.status == 0 and ended.err == ""
    assert all(command in ended.out for command in COMMANDS)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("compile", "--kv-cache -ctk -ctv --kv-layers --kv-capacity --target -o --output --model-format"),
        ("compile", "--dump-code --pass-config --disabled-pass --print-ir-before --print-ir-after"),
        ("compile", "--dtype --print-pass-times -O --input-shapes --tuning-records --json -v"),
        ("compile", "--kv-sinks --kv-recent --kv-center --no-kv-center --kv-defer"),
        ("run", "--device --prompt --max-tokens --temperature --top-p --seed --stop --chat --inputs"),
        ("run", "--outputs --fill-mode --print-time --profile --repeat --number --json -v"),
        ("formats", "--json -v"),
        ("inspect", "--svg --json -v"),
    ],
)
def test_help_of_a_command_names_its_options(tvmc, command, options):
    ended = tvmc(command, "--help")
    assert ended.status == 0 and ended.err == ""
    assert [option for option in options.split() if option not in ended.out] == []


def test_version(tvmc):
    assert rotquant_tvm.__version__ in tvmc("--version").out


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("tunes",),
        ("compile",),
        ("compile", "m", "--kv-sinks", "-1"),
        ("compile", "m", "--kv-recent", "many"),
        ("compile", "m", "--kv-center", "0"),
        ("compile", "m", "--kv-center", "64", "--no-kv-center"),
        ("compile", "m", "--kv-defer", "1.5"),
        ("compile", "m", "--kv-cach", "rq3"),
        ("compile", "m", "-O", "9"),
        ("compile", "m", "--dtype", "int8"),
        ("compile", "m", "--model-format", "tflite"),
        ("compile", "m", "--dump-code", "wasm"),
        ("compile", "m", "--kv-capacity", "0"),
        ("compile", "m", "--kv-capacity", "-3"),
        ("compile", "m", "--kv-capacity", "many"),
        ("run", "a", "--max-tokens", "0"),
        ("run", "a", "--temperature", "-1"),
        ("run", "a", "--temperature", "nan"),
        ("run", "a", "--temperature", "inf"),
        ("run", "a", "--top-p", "0"),
        ("run", "a", "--top-p", "1.5"),
        ("run", "a", "--seed", "-1"),
        ("run", "a", "--repeat", "0"),
        ("run", "a", "--fill-mode", "sevens"),
        ("formats", "--head-dims", "0"),
        ("formats", "--head-dims", ","),
    ],
)
def test_what_the_grammar_refuses_is_a_usage_error(tvmc, arguments):
    ended = tvmc(*arguments)
    assert ended.status == 2 and ended.out == ""
    assert "--help" in ended.error


def test_usage_errors_are_documents_with_json(tvmc):
    ended = tvmc("compile", "m", "--kv-capacity", "0", "--json")
    assert ended.document["error"]["exit_status"] == ended.status == 2
    assert ended.document["error"]["message"] in ended.error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModelError("no such thing"), 4),
        (DeviceError("device is gone"), 3),
        (AssertionError(), 3),
        (RuntimeError("context\nthe reason"), 3),
        (MemoryError(), 3),
    ],
)
def test_whatever_a_command_raises_becomes_one_line(tvmc, monkeypatch, error, status):
    def fail(*_):
        raise error

    monkeypatch.setattr("rotquant_tvm.cli.formats._describe", fail)
    ended = tvmc("formats")
    assert ended.status == status and ended.out == "" and ended.err.count("\n") == 1
    assert str(error).split("\n")[-1] in ended.error
    if not isinstance(error, ModelError | DeviceError):
        assert type(error).__name__ in ended.error and "-vv" in ended.error
    assert tvmc("formats", "--json").document["error"]["exit_status"] == status
    loud = tvmc("formats", "-vv")
    assert loud.status == status and "Traceback" in loud.err and loud.err.count("error: ") == 1


def test_an_interrupt_ends_without_a_traceback(tvmc, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rotquant_tvm.cli.formats._describe", interrupt)
    ended = tvmc("formats")
    assert (ended.status, ended.out, ended.err) == (130, "", "error: interrupted\n")


def test_quick_commands_load_neither_torch_nor_tvm(tvmc_process):
    script = (
        "import sys; from rotquant_tvm.cli.main import main\n"
        "for words in (['--help'], ['formats'], ['compile', 'x', '--kv-cache', 'no'],\n"
        "              ['compile', 'nowhere'], ['run', 'nowhere'], ['inspect', 'nowhere']): main(words)\n"
        "print([name for name in ('torch', 'tvm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_reader_that_stops_reading_is_no_failure():
    writer = subprocess.Popen(
        [sys.executable, "-m", "rotquant_tvm.cli.main", "formats", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    writer.stdout.close()
    assert writer.wait(60) == 0 and writer.stderr.read() == b""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_a_compile_leaves_nothing(model, tmp_path, number, status):
    running = subprocess.Popen(
        [sys.executable, "-m", "rotquant_tvm.cli.main", "compile", model, "-o", tmp_path / "a.rq", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = []
    for line in running.stderr:
        seen.append(line)
        if line.startswith("import"):
            break
    time.sleep(0.5)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    # Python ends by the signal itself where the interrupt came inside a text given to exec(); to a shell both are 130.
    assert running.returncode in (status, -number) and out == "" and "Traceback" not in err, (seen, err)
    assert os.listdir(tmp_path) == []


def test_json_is_all_there_is_on_standard_output(tvmc_process):
    ended = tvmc_process("formats", "--json", "rq3")
    assert json.loads(ended.out)["formats"][0]["name"] == "rq3" and ended.err == ""
