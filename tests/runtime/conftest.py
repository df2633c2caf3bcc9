"""A small real artifact for the runtime's tests: compiled by TVM once, loaded as a user would."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rotquant_tvm.runtime import CompiledLibrary, TokenizerSpec, load_library, write_artifact

IM_START, IM_END, BOS = 256, 257, 258
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _load_fake_model():
    # Imported by its file: under pytest's importlib mode test folders are no packages.
    spec = importlib.util.spec_from_file_location(
        "rotquant_tvm_fake_model", Path(__file__).parent / "fake_model.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake_model():
    """The module ``fake_model``: its sizes, weights and NumPy reference."""
    return _load_fake_model()


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for every byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(spare)) for byte in range(256)]


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A tokenizer whose token ids 0–255 are the bytes of the text."""
    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<s>")]
    )
    assert tokenizer.token_to_id("<|im_end|>") == IM_END
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def library_bytes(fake_model, tmp_path_factory) -> bytes:
    """The compiled shared library."""
    path = tmp_path_factory.mktemp("library") / "model.so"
    fake_model.compile_library().export_library(str(path))
    return path.read_bytes()


@pytest.fixture(scope="session")
def write(fake_model, library_bytes, tokenizer_json):
    """Write the artifact at a path; keyword arguments replace the usual ones."""

    def write_it(path: Path, **changes) -> Path:
        arguments = {
            "library": library_bytes,
            "weights": fake_model.weights(),
            "kv_cache_info": fake_model.INFO,
            "target": json.dumps({"kind": "llvm"}),
            "report": {"layers": 2},
            "tokenizer_json": tokenizer_json,
            "tokenizer": TokenizerSpec((IM_END,), BOS, CHAT_TEMPLATE),
            "default_capacity": 128,
        }
        write_artifact(path, **(arguments | changes))
        return path

    return write_it


@pytest.fixture
def artifact(write, tmp_path) -> Path:
    """A fresh artifact that the test may damage."""
    return write(tmp_path / "model.rq")


@pytest.fixture(scope="session")
def library(write, tmp_path_factory) -> CompiledLibrary:
    """The artifact, loaded; sessions over it are independent."""
    return load_library(write(tmp_path_factory.mktemp("artifact") / "model.rq"))
