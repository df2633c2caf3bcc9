"""Model directories: what is read from them, and what is wrong with those that cannot be read."""

from __future__ import annotations

import json
import pickle
import resource
import time

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend import import_model
from rotquant_tvm.runtime import TokenizerSpec
from rotquant_tvm.runtime.tokenizer import TextTokenizer

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }} {{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)


def _tokenizer(**arguments):
    words = ["<unk>", "<s>", "</s>", "<|start|>", "<|end|>", "user", "assistant", "hello"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[:5])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **arguments
    )


def test_directory_without_tokenizer_in_half_precision(tiny, tmp_path):
    model = tiny("Llama")
    model.save_pretrained(tmp_path)
    imported = import_model(str(tmp_path), dtype="float16")
    assert imported.tokenizer is None
    saved = {name: parameter.detach().half().numpy() for name, parameter in model.named_parameters()}
    assert set(imported.weight_names) == set(saved)
    for name, weight in zip(imported.weight_names, imported.weights, strict=True):
        np.testing.assert_array_equal(weight, saved[name])


def test_directory_with_tokenizer(tiny, tmp_path):
    model = tiny("Llama")
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(tmp_path)
    _tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path)
    data = import_model(tmp_path).tokenizer
    assert data.eos_token_ids == (2, 4, 7)  # the tokenizer's, the chat template's, the generation config's
    assert data.bos_token_id == 1
    assert data.chat_template == TEMPLATE
    assert Tokenizer.from_str(data.json).encode("<|start|> user hello <|end|>").ids == [3, 5, 7, 4]


def test_the_tokenizers_own_eos_comes_first(tiny, tmp_path):
    model = tiny("Llama")
    model.generation_config.eos_token_id = [7, 0]
    model.save_pretrained(tmp_path)
    tokenizer = _tokenizer(chat_template=TEMPLATE)
    tokenizer.eos_token = "<|end|>"
    tokenizer.save_pretrained(tmp_path)
    data = import_model(tmp_path).tokenizer
    assert data.eos_token_ids == (4, 0, 2, 7)
    spec = TokenizerSpec(data.eos_token_ids, data.bos_token_id, "{{ eos_token }}hello")
    assert TextTokenizer(data.json, spec).encode_chat([{"role": "user", "content": ""}]) == [4, 7]


def test_chat_template_that_refuses_leaves_the_other_ids(tiny, tmp_path):
    tiny("Llama").save_pretrained(tmp_path)
    _tokenizer(chat_template="{{ raise_exception('no chat here') }}").save_pretrained(tmp_path)
    assert import_model(tmp_path).tokenizer.eos_token_ids == (2,)


def _write_config(path, **config):
    (path / "config.json").write_text(json.dumps(config))


def test_unusable_directories(tiny, tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        import_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        import_model(tmp_path)
    _write_config(tmp_path, hidden_size=64)
    with pytest.raises(ModelError, match="names no model_type"):
        import_model(tmp_path)
    _write_config(tmp_path, model_type="perpetuum")
    with pytest.raises(ModelError, match="does not know the model type 'perpetuum'"):
        import_model(tmp_path)
    _write_config(tmp_path, model_type="t5", is_encoder_decoder=True)
    with pytest.raises(ModelError, match="'t5' is an encoder-decoder"):
        import_model(tmp_path)
    _write_config(tmp_path, **tiny("Llama").config.to_dict())
    with pytest.raises(ModelError, match=r"cannot be loaded: .*no file"):
        import_model(tmp_path)


def test_damaged_and_missing_weights(tiny, tmp_path):
    model = tiny("Llama")
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        import_model(tmp_path)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match=r"lacks the weight 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        import_model(tmp_path)


def test_paths_that_are_no_model(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        import_model(tmp_path / "absent")
    (tmp_path / "model.txt").write_text("text")
    with pytest.raises(ModelError, match="is not a model"):
        import_model(tmp_path / "model.txt")


CLAIMS = {
    "words": {"vocab_size": 1 << 31},
    "layers": {"num_hidden_layers": 1 << 31},
    "layers within bounds": {"num_hidden_layers": 9_999},
    "widths": {"intermediate_size": 1 << 26},
    "experts": {"model_type": "mixtral", "num_local_experts": 1 << 20},
}


@pytest.mark.parametrize("what", CLAIMS)
def test_sizes_that_the_weights_do_not_have_are_refused_at_once(what, tiny, tmp_path):
    model = tiny("Llama")
    model.save_pretrained(tmp_path)
    _write_config(tmp_path, **{**json.loads((tmp_path / "config.json").read_text()), **CLAIMS[what]})
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ModelError, match=r"layers can be loaded|and its weights have \d+ bytes"):
        import_model(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
    assert time.process_time() - began < 5


@pytest.mark.parametrize("model_type", [[], {}, None, 7, ""])
def test_a_model_type_that_is_no_name_is_unknown(model_type, tmp_path):
    _write_config(tmp_path, model_type=model_type)
    with pytest.raises(ModelError, match="does not know the model type"):
        import_model(tmp_path)


def test_no_code_of_a_directory_runs(tiny, tmp_path, monkeypatch):
    """Neither Python beside the model, nor a pickle in place of weights; and nobody is asked whether it should."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    ran = tmp_path / "ran"
    tiny("Llama").save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Model: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    _write_config(tmp_path, **config, auto_map={"AutoConfig": "code.Model", "AutoModelForCausalLM": "code.Model"})
    import_model(tmp_path)
    _write_config(tmp_path, model_type="clip", auto_map={"AutoModelForCausalLM": "code.Model"})
    with pytest.raises(ModelError, match="contains custom code"):
        import_model(tmp_path)
    _write_config(tmp_path, **config)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Model", None]}}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        import_model(tmp_path)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Opens(ran)))
    with pytest.raises(ModelError, match="cannot be loaded"):
        import_model(tmp_path)
    assert not ran.exists()


class _Opens:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("eos", ["", {}, -1, [3.5, None], 10**30])
def test_ending_ids_that_are_none_are_left_out(eos, tiny, tmp_path):
    tiny("Llama").save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert import_model(tmp_path).tokenizer.eos_token_ids == (2,)


def test_special_tokens_that_are_none_are_refused_and_templates_left_out(tiny, tmp_path):
    tiny("Llama").save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    own = json.loads(file.read_text())
    file.write_text(json.dumps({**own, "chat_template": True}))
    assert import_model(tmp_path).tokenizer.chat_template is None
    file.write_text(json.dumps({key: value for key, value in own.items() if not key.endswith("_token")}))
    names = {"bos_token": {}, "eos_token": "</s>", "unk_token": ""}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    with pytest.raises(ModelError, match="cannot be loaded: maximum recursion depth"):
        import_model(tmp_path)


@pytest.mark.parametrize("name", ["/dev/zero", "../elsewhere.safetensors", "absent", "", ".", "a\0b", 1, None])
def test_an_index_that_names_anything_but_files_of_its_folder_is_refused(name, tiny, tmp_path):
    folder = tmp_path / "model"
    tiny("Llama").save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (tmp_path / "elsewhere.safetensors").write_bytes((folder / "part.safetensors").read_bytes())
    index = {"metadata": {}, "weight_map": dict.fromkeys(tiny("Llama").state_dict(), "part.safetensors")}
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    assert import_model(folder).weights
    index["weight_map"]["lm_head.weight"] = name
    file.write_text(json.dumps(index))
    with pytest.raises(ModelError, match="which is no file in this folder"):
        import_model(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 1}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(text, tiny, tmp_path):
    tiny("Llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert import_model(tmp_path).weights  # an index beside the whole is not read
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="is no index of weights"):
        import_model(tmp_path)
