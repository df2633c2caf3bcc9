"""The command line in this process, a tiny model with a tokenizer, and one real compile of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from rotquant_tvm import cli
from rotquant_tvm.cli.main import COMMANDS, main

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '</s>' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """In the background of a shell interrupts are ignored, by what a test starts too."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@cache
def schema_of(command: str):
    """The validator of what a command writes with --json."""
    import jsonschema

    text = (Path(cli.__file__).parent / "schemas" / f"{command}.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def _no_number(text: str):
    raise ValueError(f"{text} is no JSON")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str
    command: str = ""

    @property
    def document(self):
        """The one JSON document on standard output, which the command's schema describes."""
        document = json.loads(self.out, parse_constant=_no_number)
        if self.command in COMMANDS:
            problem = next(schema_of(self.command).iter_errors(document), None)
            assert problem is None, f"{problem.json_path}: {problem.message}"
            assert ("error" in document) == (self.status not in (0, 1))
        return document

    @property
    def error(self) -> str:
        """The one ``error:`` line, the last that the command wrote."""
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and self.err.endswith(lines[0] + "\n"), self.err
        return lines[0]


@pytest.fixture
def tvmc(capsys):
    """Run a command in this process."""

    def run(*arguments) -> Ended:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Ended(status, *capsys.readouterr(), _command(arguments))

    return run


@pytest.fixture(scope="session")
def tvmc_process():
    """Run a command as users do, in a process of its own."""

    def run(*arguments, **environment) -> Ended:
        done = subprocess.run(
            [sys.executable, "-m", "rotquant_tvm.cli.main", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | environment,
        )
        return Ended(done.returncode, done.stdout, done.stderr, _command(arguments))

    return run


def _command(arguments) -> str:
    return next((str(word) for word in arguments if word in COMMANDS), "")


def byte_tokenizer():
    """A tokenizer whose ids 0–255 are bytes, 256 <s>, 257 </s>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    symbols = [chr(byte) if byte in kept else chr(next(spare)) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_llama(folder: Path, layers: int = 2, positions: int = 256) -> Path:
    """A random Llama, head_dim 32, with a tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        bos_token_id=256,
        eos_token_id=257,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15).add_(0.5 if parameter.ndim == 1 else 0.0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The tiny model's directory."""
    return save_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@dataclass(frozen=True)
class Compiled:
    """A finished ``tvmc compile`` and what it wrote."""

    ended: Ended
    artifact: Path


@pytest.fixture(scope="session")
def compiled(model, tmp_path_factory, tvmc_process) -> Compiled:
    """One compile with everything that can be asked of it."""
    artifact = tmp_path_factory.mktemp("artifacts") / "tiny.rq"
    ended = tvmc_process(
        "compile",
        model,
        *("-ctk", "iso3", "-ctv", "planar3", "--kv-layers", "-1=rq4", "--kv-capacity", 128),
        "--every-logit",
        *("--dump-code", "ir,tir,asm", "--print-pass-times", "--print-ir-after", "HoistRotation"),
        *("--pass-config", "tirx.disable_cse_tir=true", "-O2", "-o", artifact, "--json"),
    )
    assert ended.status == 0, ended.err
    return Compiled(ended, artifact)


@pytest.fixture(scope="session")
def artifact(compiled) -> Path:
    """The compiled artifact; not to be changed."""
    return compiled.artifact
