"""Model directories of any content: configurations, weights and what stands beside them."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

from rotquant_tvm.frontend import import_model
from rotquant_tvm.frontend.hf import load

from .fuzzing import JSON_PIECES, PLAIN, changed, forms, fuzz, mutated
from .model_files import VOCABULARY, WIDTH, directory_files
from .reading import read

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NUMBERS = st.sampled_from((0, 1, 2, 3, 7, 2**10, 2**16, 2**20, 2**31 - 1, 2**40, 2**63, 10**30, -1, 0.5, True))
ENTRIES = {
    "model_type": st.sampled_from((*CONFIG_MAPPING, "none")),
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"), NUMBERS),
    **dict.fromkeys(("intermediate_size", "num_key_value_heads", "max_position_embeddings", "num_experts"), NUMBERS),
    "rope_parameters": st.fixed_dictionaries(
        {"rope_type": st.sampled_from(("default", "linear", "dynamic", "yarn", "longrope", "llama3", "x"))},
        optional=dict.fromkeys(("factor", "rope_theta", "original_max_position_embeddings", "long_factor"), PLAIN),
    ),
    "quantization_config": st.fixed_dictionaries(
        {"quant_method": st.sampled_from(("awq", "gptq", "bitsandbytes", "fp8", "mxfp4", "torchao", "quanto", "x"))},
        optional={"bits": NUMBERS, "group_size": NUMBERS, "modules_to_not_convert": PLAIN},
    ),
    "auto_map": st.sampled_from(({"AutoConfig": "code.Config"}, {"AutoModelForCausalLM": "code.Model"}, [])),
    "architectures": st.sampled_from((["LlamaModel"], ["Nothing"], [1], "x")),
    "layer_types": st.lists(st.sampled_from(("full_attention", "sliding_attention", "x")), max_size=3),
    "tie_word_embeddings": st.booleans(),
    "is_encoder_decoder": st.booleans(),
    "sliding_window": NUMBERS,
    "dtype": st.sampled_from(("float64", "int8", "float8_e4m3fn", "os", "nn", "load", 1)),
    "hidden_act": st.sampled_from(("gelu", "relu2", "xielu", "x", 1)),
    "text_config": st.dictionaries(st.sampled_from(("vocab_size", "num_hidden_layers")), NUMBERS),
    "attn_implementation": st.sampled_from(("sdpa", "flash_attention_2", "kernels-community/x", 1)),
}
"""Entries that readers look at, with values that mean something."""

SHARES = st.integers(0, 99).map(lambda number: number < 3)
"""How many inputs are imported to the end, where the reader takes them."""


@pytest.fixture
def folder(tmp_path):
    """A valid directory; the first reading of a process takes up what the package needs."""
    for name, content in directory_files().items():
        (tmp_path / name).write_bytes(content)
    assert import_model(tmp_path).tokenizer is not None
    return tmp_path


def read_folder(folder, whole: bool) -> None:
    """Read a directory as imports do, some to the end."""
    loaded = read(lambda: load(folder, torch.float32))
    if loaded is not None:
        assert all(not parameter.is_meta for parameter in loaded.model.parameters())
    if loaded is not None and whole:
        read(lambda: import_model(folder))


def configs() -> st.SearchStrategy:
    """Configurations with entries of other values, and other parts changed in any way."""
    valid = json.loads(directory_files()["config.json"])
    one = st.sampled_from(sorted(ENTRIES)).flatmap(lambda key: ENTRIES[key].map(lambda value: {key: value}))
    meant = st.lists(one, min_size=1, max_size=3).map(
        lambda parts: {k: v for part in (valid, *parts) for k, v in part.items()}
    )
    return meant | changed(valid) | meant.flatmap(changed) | PLAIN


@forms(40, 4_000)
def test_a_configuration_of_any_json(examples, folder):
    def check(case):
        document, whole = case
        (folder / "config.json").write_text(json.dumps(document))
        read_folder(folder, whole)

    fuzz("directories (config.json as JSON)", st.tuples(configs(), SHARES), check, examples)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", WEIGHTS])
@forms(30, 3_000)
def test_files_of_any_bytes(examples, folder, name):
    valid = (folder / name).read_bytes()

    def check(case):
        content, whole = case
        (folder / name).write_bytes(content)
        read_folder(folder, whole)

    fuzz(f"directories ({name})", st.tuples(mutated(st.just(valid), JSON_PIECES), SHARES), check, examples)


def header_and_values() -> tuple[dict, bytes]:
    """The header of the valid weights, and what follows it."""
    content = directory_files()[WEIGHTS]
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Weights whose header says something else of its tensors: other shapes, types, places, names."""
    header, values = header_and_values()
    for name in draw(st.lists(st.sampled_from([each for each in header if each != "__metadata__"]), max_size=3)):
        entry = dict(header.get(name, {}))
        key = draw(st.sampled_from(("shape", "dtype", "data_offsets", "name", "like another", "gone")))
        sizes = st.integers(0, 64) | st.sampled_from((VOCABULARY, WIDTH, 2**31, 2**63, 2**64 - 1, -1))
        if key == "shape":
            entry[key] = draw(st.lists(sizes, max_size=4) | st.just([1] * 3000))
        elif key == "dtype":
            entry[key] = draw(st.sampled_from(("F64", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL", "F4", "C64", "x")))
        elif key == "data_offsets":
            entry[key] = draw(st.lists(sizes | st.just(len(values)), min_size=2, max_size=2))
        elif key == "like another":
            entry = dict(draw(st.sampled_from([part for part in header.values() if "shape" in part])))
        header.pop(name, None)
        if key != "gone":
            header[name if key != "name" else draw(st.text(max_size=8))] = entry
    document = draw(st.just(header) | changed(header))
    text = json.dumps(document).encode()
    length = draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    return struct.pack("<Q", length) + text + values + draw(st.binary(max_size=8))


@forms(40, 4_000)
def test_weights_with_any_header(examples, folder):
    def check(case):
        content, whole = case
        (folder / WEIGHTS).write_bytes(content)
        read_folder(folder, whole)

    fuzz("directories (headers of weights)", st.tuples(headers(), SHARES), check, examples)


@forms(30, 2_000)
def test_an_index_of_any_json(examples, folder):
    """Weights in several files, of which an index tells the names."""
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).rename(folder / "part.safetensors")
    names = [name for name in header_and_values()[0] if name != "__metadata__"]
    index = {"metadata": {"total_size": len(content)}, "weight_map": dict.fromkeys(names, "part.safetensors")}
    files = st.sampled_from(("part.safetensors", "../x", "/dev/zero", "config.json", "absent", "", ".", "a\0b", 1))
    other = st.dictionaries(st.sampled_from(names), files, max_size=3).map(
        lambda some: {**index, "weight_map": {**index["weight_map"], **some}}
    )

    def check(case):
        document, whole = case
        (folder / INDEX).write_text(json.dumps(document))
        read_folder(folder, whole)

    fuzz("directories (index of weights)", st.tuples(st.just(index) | other | changed(index), SHARES), check, examples)
