"""Small valid models of every kind that is read: a few KiB each, made once, with random weights."""

from __future__ import annotations

import functools
import io
import json
import tempfile
import zipfile
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import nn

from rotquant_tvm.frontend.quiet import quiet

WORDS = ["<unk>", "<s>", "</s>", "<|end|>", "user", "assistant", "hello", "you"]
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}<|end|>{% endfor %}"
VOCABULARY, WIDTH, HEADS, HEAD_DIM = 24, 16, 2, 8


@functools.cache
def directory_files() -> dict[str, bytes]:
    """The files of a transformers model directory, by name: a llama of one layer with a tokenizer."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with tempfile.TemporaryDirectory() as folder, quiet():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        found = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    return found | tokenizer_files()


@functools.cache
def tokenizer_files() -> dict[str, bytes]:
    """The files of a tokenizer of eight words, four of them special, with a chat template."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:4]])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **names)
    with tempfile.TemporaryDirectory() as folder, quiet():
        fast.save_pretrained(folder)
        found = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    found["special_tokens_map.json"] = json.dumps(names).encode()
    found["tokenizer_config.json"] = json.dumps(
        json.loads(found["tokenizer_config.json"]) | {"chat_template": TEMPLATE}
    ).encode()
    found.pop("chat_template.jinja", None)
    return found


@functools.cache
def gguf_file() -> bytes:
    """A GGUF file: a llama of one layer with a byte-level tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for add, value in (
            *((writer.add_vocab_size, VOCABULARY), (writer.add_context_length, 64), (writer.add_block_count, 1)),
            *((writer.add_embedding_length, WIDTH), (writer.add_feed_forward_length, 16), (writer.add_head_count, 2)),
            *((writer.add_head_count_kv, 1), (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 1e4)),
            *((writer.add_rope_dimension_count, HEAD_DIM), (writer.add_tokenizer_model, "gpt2")),
            (writer.add_token_list, ["<s>", "</s>", "he", *(chr(ord("a") + n) for n in range(VOCABULARY - 3))]),
            (writer.add_token_types, [3, 3] + [1] * (VOCABULARY - 2)),
            *((writer.add_token_merges, ["h e"]), (writer.add_bos_token_id, 0), (writer.add_eos_token_id, 1)),
        ):
            add(value)
        rng = np.random.default_rng(0)
        shapes = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,), "blk.0.attn_norm": (WIDTH,)}
        shapes |= {f"blk.0.attn_{x}": (rows, WIDTH) for x, rows in (("q", 16), ("k", 8), ("v", 8), ("output", 16))}
        shapes |= {f"blk.0.ffn_{x}": (16, WIDTH) for x in ("down", "gate", "up")} | {"blk.0.ffn_norm": (WIDTH,)}
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


class _Step(nn.Module):
    """A decoder of one layer that takes past keys and values and returns the grown ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, tokens, past):
        """tokens [batch, seq]; past (keys, values), each [batch, heads, past, head_dim]."""
        x = self.embedding(tokens)
        q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        length, seq = k.shape[2], tokens.shape[1]
        visible = torch.arange(length)[None, :] <= torch.arange(length - seq, length)[:, None]
        attended = nn.functional.scaled_dot_product_attention(q, k, v, visible)
        return self.head(self.norm(x + attended.transpose(1, 2).flatten(2) * self.scale)), (k, v)


@functools.cache
def program_records() -> dict[str, bytes]:
    """The records of a saved program (a .pt2 file), without their folder."""
    batch, seq, past = (torch.export.Dim(name) for name in ("batch", "seq", "past"))
    sizes = {0: batch, 2: past}
    inputs = (torch.zeros((2, 3), dtype=torch.int64), tuple(torch.zeros(2, HEADS, 5, HEAD_DIM) for _ in "kv"))
    torch.manual_seed(0)
    program = torch.export.export(_Step().eval(), inputs, dynamic_shapes=({0: batch, 1: seq}, (sizes, sizes)))
    file = io.BytesIO()
    torch.export.save(program, file)
    with zipfile.ZipFile(file) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def zipped(records: dict[str, bytes]) -> bytes:
    """A .pt2 file of these records."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"program/{name}", content)
    return file.getvalue()
