"""A tokenizer beside a model, read from its files alone."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.tokenizer_files import folder_tokenizer

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    """A folder with a tokenizer of two words and three special tokens."""
    tokenizer = Tokenizer(models.WordLevel({"yes": 0, "no": 1, "<s>": 2, "</s>": 3, "<|end|>": 4}, unk_token="yes"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<|end|>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_nothing_without_a_file(tmp_path):
    assert folder_tokenizer(tmp_path) is None


def test_a_bare_tokenizer_has_no_special_ids(folder):
    data = folder_tokenizer(folder)
    assert (data.eos_token_ids, data.bos_token_id, data.chat_template) == ((), None, None)
    assert Tokenizer.from_str(data.json).encode("no", is_pretokenized=False).ids == [1]


def test_special_tokens_and_ends_come_from_the_files_beside_it(folder):
    own = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    (folder / "genai_config.json").write_text(json.dumps({"model": {"eos_token_id": 0}}))
    data = folder_tokenizer(folder)
    assert data.eos_token_ids == (3, 0, 1, 4)  # its own first; 4 is what the template ends an answer with
    assert data.bos_token_id == 2 and data.chat_template == TEMPLATE


def test_a_template_file_comes_first_and_a_refusing_one_is_kept(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    data = folder_tokenizer(folder)
    assert data.chat_template == "{{ raise_exception('no') }}" and data.eos_token_ids == ()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "\udcff", "[" * 100_000])
def test_damaged_files_are_refused(folder, name, text):
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=name):
        folder_tokenizer(folder)


def test_templates_and_ids_of_other_kinds_are_left_out(folder):
    templates = [None, 3, {"name": "default", "template": TEMPLATE}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, -1, True, 10**30, "2", {}]}))
    data = folder_tokenizer(folder)
    assert data.chat_template == TEMPLATE and data.eos_token_ids == (3, 4)


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ 'x' * 99999999999 }}", "{{ " + "(" * 3000, "{{ 9 ** 9 ** 9 }}"]
)
def test_templates_that_fail_in_any_way_are_kept(template, folder):
    (folder / "chat_template.jinja").write_text(template)
    assert folder_tokenizer(folder).chat_template == template
