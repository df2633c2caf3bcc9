"""Text to tokens and back, whole and token by token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from rotquant_tvm.errors import ArtifactError, UsageError
from rotquant_tvm.runtime import TokenizerSpec
from rotquant_tvm.runtime.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json):
    return TextTokenizer(tokenizer_json, TokenizerSpec((257,), 258))


plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(text=plain_text)
def test_a_stream_never_cuts_a_character(tokenizer, text):
    stream = tokenizer.stream(tokenizer.encode("prompt é"))
    pieces = [stream.push(token) for token in text.encode()]
    assert "".join(pieces) + stream.finish() == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@given(data=st.binary(max_size=15))
def test_invalid_bytes_come_out_as_a_whole_decode_shows_them(tokenizer, data):
    stream = tokenizer.stream()
    shown = "".join(stream.push(token) for token in data) + stream.finish()
    assert shown == tokenizer.decode(data) == data.decode("utf-8", "replace")


def test_endless_invalid_bytes_are_not_held_forever(tokenizer):
    stream = tokenizer.stream()
    shown = "".join(stream.push(0x80) for _ in range(100))
    assert len(shown) > 80 and set(shown) == {"\ufffd"}
    assert stream.push(ord("a")).endswith("a")


def test_the_first_word_keeps_its_space():
    # A SentencePiece-like decoder strips the space of the first token it sees, which is not the text's first.
    inner = Tokenizer(
        models.BPE(vocab={"▁": 0, "▁a": 1, "▁b": 2, "a": 3, "b": 4}, merges=[("▁", "a"), ("▁", "b")])
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = TextTokenizer(inner.to_str(), TokenizerSpec())
    prompt = tokenizer.encode("a b")
    stream = tokenizer.stream(prompt)
    assert "".join(stream.push(token) for token in [1, 2]) == " a b"


def test_special_tokens_make_no_text(tokenizer):
    assert tokenizer.encode("<|im_start|>a") == [256, 97]
    assert tokenizer.decode([256, 97, 257]) == "a"
    stream = tokenizer.stream()
    assert [stream.push(token) for token in (256, 97, 257, 98)] == ["", "a", "", "b"]


def test_an_empty_text_is_the_bos_token(tokenizer, tokenizer_json):
    assert tokenizer.encode("") == [258]
    with pytest.raises(UsageError, match="prompt is empty"):
        TextTokenizer(tokenizer_json, TokenizerSpec()).encode("")


def test_truncation_and_padding_of_the_file_are_switched_off(tokenizer_json):
    inner = Tokenizer.from_str(tokenizer_json)
    inner.enable_truncation(4)
    inner.enable_padding(length=10)
    tokenizer = TextTokenizer(inner.to_str(), TokenizerSpec())
    assert tokenizer.encode("abcdefgh") == list(b"abcdefgh")


def test_a_broken_tokenizer_file_is_an_artifact_error():
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        TextTokenizer('{"model": 3}', TokenizerSpec())


def test_a_tokenizer_may_lack_its_special_tokens(tokenizer_json):
    spec = TokenizerSpec((9999,), 9998, "{{ bos_token is defined }}{{ messages[0].content }}")
    assert TextTokenizer(tokenizer_json, spec).encode_chat([{"role": "user", "content": "x"}]) == list(
        b"Falsex"
    )


def test_pre_tokenizer_of_the_file_is_used():
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    assert TextTokenizer(inner.to_str(), TokenizerSpec()).encode("a  b c") == [0, 1, 2]
