"""Every example of the help, run in a shell as it is printed, in a folder where the files that it names are.

The model is a tiny one, in a folder called ``model.gguf``. What is printed stays; options are added that end a
search or a measurement early. Where there is no GPU, ``--target cuda`` becomes ``--target llvm``.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tvm

from rotquant_tvm.cli.help_text import OVERVIEW, help_parts
from rotquant_tvm.cli.main import COMMANDS
from rotquant_tvm.tuning.log_folders import packaged_logs

from .conftest import save_llama

HAS_GPU = bool(tvm.cuda(0).exist)
SHORTER = {"tune": "--trials 3 --number 1 --repeat 1 --min-repeat-ms 0 --parallel 1", "bench": "--samples 1"}
"""What is added to examples of these commands, unless they list tasks alone."""
H100 = "nvidia-h100-80gb-hbm3"
TEXT = "--text wiki.test.raw --kv-cache rq3"


def lines_of(text: str) -> list[str]:
    """The examples in a text as one would copy them, redirections included, without what is said of them."""
    return [line.strip().partition("   ")[0] for line in text.splitlines() if line.startswith("  tvmc ")]


def examples_of(command: str) -> list[str]:
    return lines_of(help_parts(importlib.import_module(f"rotquant_tvm.cli.{command}").__doc__)[1])


@dataclass(frozen=True)
class Promise:
    """Patterns that standard output must have, the files that must be there then, and the exit status."""

    said: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    status: int = 0


ARTIFACT = ("model.so", "weights.safetensors", "tokenizer.json", "manifest.json")


def artifact(name: str, *said: str) -> Promise:
    return Promise((*said, rf"wrote .*/{name}$"), tuple(f"{name}/{file}" for file in ARTIFACT))


PROMISES = {
    "tvmc compile model.gguf --kv-cache rq3 -o model.rq": artifact("model.rq", "hurwitz3:ip +hurwitz3 ", "sinks=4"),
    'tvmc compile ./llama --kv-cache iso3/planar3 --kv-layers "0,-1=f16" --target cuda': artifact(
        "llama.rq", "^0 +f16 +f16", "^1–2 +iso3 +planar3", "^3 +f16"
    ),
    "tvmc compile model.gguf --kv-cache iso3 --kv-sinks 4 --kv-recent 8 --kv-center 64": artifact(
        "model.gguf.rq", r"iso3 \(sinks=4,recent=8,center=64\)"
    ),
    'tvmc compile model.gguf --input-shapes "ids:[1,-1]"': artifact("model.gguf.rq", "0–3 +hurwitz3:ip"),
    'tvmc run model.rq --prompt "Once upon a time" --max-tokens 100': Promise((".",)),
    'tvmc run model.rq --chat --prompt "What is a rotation?" --temperature 0.7 --seed 1': Promise((".",)),
    "tvmc run model.rq --inputs ids.npz --outputs logits.npz --print-time --repeat 10": Promise(
        ("likeliest next id", "execution time", "wrote logits.npz"), ("logits.npz",)
    ),
    "tvmc tune model.gguf --kv-cache rq3 --target cuda": Promise(
        ("hurwitz3:ip/hurwitz3 2/1x32 .*sinks=4", "wrote 3 records to .*/data/rotquant_tvm/tuning_logs/")
    ),
    "tvmc tune model.gguf --kv-cache rq3 --target cuda --time-budget 600": Promise(("rule's", "wrote 3 records")),
    "tvmc tune --target cuda --heads 32 --kv-heads 8 --head-dim 128 -o logs": Promise(
        ("attention_decode.* 32/8x128 ", "wrote .* records to .*/logs/")
    ),
    "tvmc tune --target cuda --shapes 1x8K,8x32K --tasks attention_decode --trials-per-task 32": Promise(
        (" 1x8K ", " 8x32K ", "wrote .* records")
    ),
    "tvmc tune model.gguf --target cuda --tasks list": Promise(("^0 +attention_decode ", "^2 +[a-z]+ ")),
    "tvmc formats": Promise(("rq3",)),
    "tvmc formats rq3 iso3 q8_0 --head-dims 128": Promise(("rq3", "iso3", "q8_0", "128")),
    "tvmc formats --json": Promise((r"^\{",)),
    "tvmc inspect model.gguf": Promise(("4 of 4 attention sites can have a packed KV cache",)),
    "tvmc inspect model.gguf --svg sites.svg": Promise(("wrote sites.svg",), ("sites.svg",)),
    "tvmc inspect model.gguf --kv-cache turbo3 --site 3 --svg site3.svg": Promise(
        ("^3 +quantize .*turbo3 +turbo3", "wrote site3.svg"), ("site3.svg",)
    ),
    "tvmc inspect model.rq": Promise(("^0–3 +hurwitz3:ip", "attention_decode")),
    f'tvmc eval model.gguf {TEXT} --kv-cache iso3 --kv-cache "hurwitz3,sinks=4,center=64"': Promise(
        ("^f16 ", "^rq3 ", "^iso3 ", "^hurwitz3,sinks=4,center=64 ", "every-token:", "generation:")
    ),
    f"tvmc eval model.gguf {TEXT} --protocol every-token --tokens 16384 --json": Promise(('"every-token"', '"kl"')),
    f"tvmc eval model.gguf {TEXT} --needle 512,1024,2048 --layers --html report.html": Promise(
        ("^needle:", "2,?048", "wrote report.html"), ("report.html",)
    ),
    "tvmc bench decode --kv-cache rq3 --kv-cache hurwitz3 --shapes 1x32K,8x32K --plot decode.svg": Promise(
        ("^1x32K +rq3 ", "^8x32K +hurwitz3 ", "wrote decode.svg"), ("decode.svg",)
    ),
    "tvmc bench roundtrip --peers ~/checkouts --json": Promise(status=2),  # it says that the checkouts are not there
    "tvmc bench decode --target llvm --shapes 1x4K": Promise(("^1x4K +hurwitz3 ", "our f16")),
    "tvmc bench e2e --kv-cache rq3 --shapes 1x32K": Promise(("1x32K decode",)),
    "tvmc logs list": Promise(("attention_decode", "H100")),
    "tvmc logs list ./logs": Promise(("attention_decode", "x86-64")),
    "tvmc logs check tuning_logs": Promise(("llvm-x86-64-v3", H100)),
    f"tvmc logs diff tuning_logs/{H100} ./new/{H100}": Promise(("records are the same", "splits|µs|faster|slower")),
    "tvmc logs merge ./logs-a ./logs-b -o tuning_logs": Promise(
        (f"wrote .* records to .*/tuning_logs/{H100}",), (f"tuning_logs/{H100}/manifest.json",)
    ),
    "tvmc env": Promise(("rotquant-tvm ", "apache-tvm ", "cpu ")),
    "tvmc env --json > environment.json": Promise(files=("environment.json",)),
    "tvmc completion bash > ~/.local/share/bash-completion/completions/tvmc": Promise(
        files=("home/.local/share/bash-completion/completions/tvmc",)
    ),
    "tvmc completion zsh > ~/.zfunc/_tvmc": Promise(files=("home/.zfunc/_tvmc",)),
}
"""What each example promises; a new one needs an entry."""

NEED_CHECKOUTS, NEED_A_GPU = (example for example in PROMISES if " roundtrip " in example or " e2e " in example)


def test_every_example_has_a_promise():
    assert sorted(example for command in COMMANDS for example in examples_of(command)) == sorted(PROMISES)


class Workshop:
    """A folder with all files that examples name, and a shell in it whose ``tvmc`` is this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_llama(folder / "llama", layers=4, positions=4096)
        shutil.copytree(folder / "llama", folder / "model.gguf")
        text = "\n".join(f"The {i}th line of a text, with {i * i} words in it." for i in range(500))
        for name in ("wiki.test.raw", "book.txt"):
            (folder / name).write_text(text)
        np.savez(folder / "ids.npz", ids=np.array([[1, 2, 3], [4, 5, 6]]))
        for name in (".local/share/bash-completion/completions", ".zfunc", "checkouts"):
            (folder / "home" / name).mkdir(parents=True)
        self._copy_logs()
        (folder / "bin").mkdir()
        script = folder / "bin" / "tvmc"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rotquant_tvm.cli.main "$@"\n')
        script.chmod(0o755)

    def _copy_logs(self) -> None:
        shutil.copytree(packaged_logs() / "llvm-x86-64-v3", self.folder / "logs" / "llvm-x86-64-v3")
        for name in ("llvm-x86-64-v3", H100):
            shutil.copytree(packaged_logs() / name, self.folder / "tuning_logs" / name)
        for name in ("new", "logs-a", "logs-b"):
            shutil.copytree(packaged_logs() / H100, self.folder / name / H100)
        manifest = self.folder / "new" / H100 / "manifest.json"
        document = json.loads(manifest.read_text())
        document["records"][0]["seconds"] /= 2
        manifest.write_text(json.dumps(document))

    def run(self, line: str) -> subprocess.CompletedProcess:
        """Run a line in bash."""
        folders = {f"XDG_{kind.upper()}_HOME": str(self.folder / kind) for kind in ("data", "cache")}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        root = str(Path(__file__).parents[2])
        environment = os.environ | folders | {"HOME": str(self.folder / "home"), "PATH": path, "PYTHONPATH": root}
        keywords = {"cwd": self.folder, "env": environment, "capture_output": True, "text": True, "errors": "replace"}
        return subprocess.run(["bash", "-c", line], timeout=500, check=False, **keywords)

    def kept(self, line: str, promise: Promise) -> None:
        """Run a line and check what was promised of it."""
        ended = self.run(line)
        assert ended.returncode == promise.status, f"{line}\n{ended.stdout}\n{ended.stderr}"
        for pattern in promise.said:
            assert re.search(pattern, ended.stdout, re.M), f"{line}\nno {pattern!r} in\n{ended.stdout}"
        for name in promise.files:
            assert (self.folder / name).stat().st_size > 100, f"{line}\n{name}"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    """With a ``model.rq`` that the examples of ``tvmc run`` load."""
    pytest.importorskip("matplotlib")
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    line = next(iter(PROMISES))
    made.kept(line, PROMISES[line])
    return made


def here(example: str) -> str:
    """An example as it runs on this machine: shorter, and on the CPU if there is no GPU."""
    _, command, *rest = example.split()
    added = "" if "list" in rest else SHORTER.get(command, "")
    if not HAS_GPU:
        example = example.replace("--target cuda", "--target llvm")
        if command == "bench" and "--target" not in rest:  # whose default is the GPU
            added += " --target llvm"
    return f"{example} {added}".strip()


@pytest.mark.full
@pytest.mark.parametrize("example", PROMISES, ids=range(len(PROMISES)))
def test_an_example_does_what_it_promises(workshop, example):
    promise = PROMISES[example]
    if example.startswith("tvmc logs check"):  # it fails if a kernel has changed since it was tuned, and says so
        found = json.loads(workshop.run("tvmc logs list tuning_logs --json").stdout)
        stale = any(record["stale"] for log in found["logs"] for record in log["records"])
        promise = Promise((*promise.said, *(["the kernel has changed since"] if stale else [])), (), int(stale))
    if example == NEED_A_GPU and not HAS_GPU:
        promise = Promise(status=2)
    workshop.kept(here(example), promise)
    if example.endswith("--json") and promise.status == 0:
        json.loads(workshop.run(here(example)).stdout)


@pytest.mark.full
@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
@pytest.mark.parametrize("example", [line for line in PROMISES if line.startswith("tvmc bench") and "llvm" not in line])
def test_what_needs_a_gpu_says_so(workshop, example):
    """As printed, and on a CPU where it has none."""
    ended = workshop.run(example)
    said = ended.stderr + ended.stdout
    assert ended.returncode == 3 and "there is none here" in said and "take 'llvm', this CPU" in said
    refused = {NEED_CHECKOUTS: "--peers races CUDA kernels", NEED_A_GPU: "examples/measure_cpu.py"}
    if example in refused:
        ended = workshop.run(here(example))
        assert refused[example] in ended.stderr + ended.stdout


@pytest.mark.full
def test_the_overview_leads_from_a_model_to_a_tuned_library(tmp_path):
    """Line by line, in a folder with a model and a text; the second compile finds the log of the first tuning."""
    pytest.importorskip("matplotlib")
    workshop = Workshop(tmp_path)
    shutil.rmtree(tmp_path / "tuning_logs")
    lines = lines_of(OVERVIEW)
    promised = dict.fromkeys(lines, Promise((".",))) | {line: artifact("model.rq") for line in lines if " -o " in line}
    tuned = False
    for line in lines:
        workshop.kept(here(line), promised[line])
        tuned |= " tune " in line
        if " compile " in line:
            assert ("record: llvm-x86-64-v" in workshop.run("tvmc inspect model.rq").stdout) == tuned
