"""Cutting a text into windows."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm.errors import ModelError, UsageError
from rotquant_tvm.evaluation.windows import encode_plain, opening_token, read_text, text_windows

TEXT = "".join(chr(33 + i % 90) for i in range(500))


def test_windows_are_consecutive_tokens_of_the_text(tokenizers):
    windows = text_windows(TEXT, tokenizers(opens=False), tokens=200, context=64)
    assert windows.bos is None and windows.ids.dtype == np.int32
    assert windows.ids.tolist() == [[ord(c) for c in TEXT[i * 64 : (i + 1) * 64]] for i in range(3)]


def test_every_window_opens_with_bos_if_texts_do(tokenizers):
    windows = text_windows(TEXT, tokenizers(opens=True), tokens=200, context=64)
    assert windows.bos == 256 and windows.context == 64
    assert windows.ids.tolist() == [[256, *(ord(c) for c in TEXT[i * 63 : (i + 1) * 63])] for i in range(3)]
    assert opening_token(tokenizers(opens=False)) is None
    assert encode_plain("ab", tokenizers(opens=True)) == [97, 98]


def test_a_short_text_gives_fewer_windows(tokenizers):
    assert len(text_windows(TEXT, tokenizers(opens=False), tokens=10**6, context=128)) == 3


def test_digests_tell_windows_apart(tokenizers):
    windows = text_windows(TEXT, tokenizers(opens=False), tokens=450, context=90)
    again = text_windows("?" + TEXT, tokenizers(opens=False), tokens=450, context=90)
    assert windows.digest(0) == windows.digest(1)  # the text repeats itself after 90 characters
    assert windows.digest(0) != again.digest(0)


def test_what_cannot_be_windows_is_refused(tokenizers, tmp_path):
    with pytest.raises(ModelError, match="fewer than one window"):
        text_windows("short", tokenizers(opens=False), tokens=100, context=50)
    for tokens, context in ((40, 50), (40, 1)):
        with pytest.raises(UsageError, match="windows of"):
            text_windows(TEXT, tokenizers(opens=False), tokens=tokens, context=context)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text(" \n")
    for name, message in (("binary", "UTF-8"), ("empty", "no text"), ("missing", "cannot be read")):
        with pytest.raises(ModelError, match=message):
            read_text(tmp_path / name)
