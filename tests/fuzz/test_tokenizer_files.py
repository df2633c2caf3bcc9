"""Tokenizers of any content, as they lie beside a model and in a model directory."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rotquant_tvm.frontend.hf import load
from rotquant_tvm.frontend.tokenizer_files import folder_tokenizer

from .fuzzing import JSON_PIECES, PLAIN, changed, forms, fuzz, mutated
from .model_files import directory_files, tokenizer_files
from .reading import read

NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
PIECES = (
    *(b"{{", b"}}", b"{%", b"%}", b"{% for i in range(9999) %}", b"{% endfor %}", b"messages", b"{{ m.__class__ }}"),
    *(b"{{ 'x' * 99999999999 }}", b"{{ 9 ** 9 ** 9 }}", b"{{ m['role'] ~ 1/0 }}", b"(" * 3000),
    *(b"{{ '%0999999999d' % 1 }}", b"{{ range(99999) | list * 9999 }}", b"{% include 'x' %}"),
    b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
)
"""What readers of chat templates stumble over."""


@pytest.fixture
def folder(tmp_path):
    """A tokenizer, and the configurations that name its ends."""
    for name, content in {**directory_files(), **tokenizer_files()}.items():
        (tmp_path / name).write_bytes(content)
    assert folder_tokenizer(tmp_path).eos_token_ids == loaded_tokenizer(tmp_path).eos_token_ids == (2, 3)
    return tmp_path


def loaded_tokenizer(folder):
    """The tokenizer that the import of a model directory reads."""
    return load(folder, torch.float32).tokenizer


def read_both(folder) -> None:
    """Read a folder without transformers and with it; a tokenizer that is taken is one."""
    for reader in (folder_tokenizer, loaded_tokenizer):
        data = read(lambda reader=reader: reader(folder))
        if data is not None:
            assert Tokenizer.from_str(data.json).get_vocab_size() >= 0
            assert all(type(end) is int and end >= 0 for end in data.eos_token_ids)
            assert data.bos_token_id is None or type(data.bos_token_id) is int
            assert data.chat_template is None or isinstance(data.chat_template, str)


@pytest.mark.parametrize("name", NAMES)
@forms(30, 2_000)
def test_files_of_any_json(examples, folder, name):
    valid = json.loads((folder / name).read_bytes())

    def check(document):
        (folder / name).write_text(json.dumps(document))
        read_both(folder)

    fuzz(f"tokenizers ({name} as JSON)", changed(valid) | PLAIN, check, examples)


@pytest.mark.parametrize("name", NAMES[:3])
@forms(30, 1_500)
def test_files_of_any_bytes(examples, folder, name):
    valid = (folder / name).read_bytes()

    def check(content):
        (folder / name).write_bytes(content)
        read_both(folder)

    fuzz(f"tokenizers ({name})", mutated(st.just(valid), JSON_PIECES), check, examples)


@forms(30, 2_000)
def test_chat_templates_of_any_bytes(examples, folder):
    valid = json.loads((folder / "tokenizer_config.json").read_bytes())["chat_template"].encode()

    def check(content):
        (folder / "chat_template.jinja").write_bytes(content)
        read_both(folder)

    fuzz("tokenizers (chat templates)", mutated(st.just(valid), PIECES), check, examples)
