"""A tokenizer of words, and logits without a model."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm.runtime import TokenizerSpec
from rotquant_tvm.runtime.tokenizer import TextTokenizer

CHAT = "{% for m in messages %}user: {{ m['content'] }}\n{% endfor %}assistant:"


def word_tokenizer(opens: bool, chat: bool = False) -> TextTokenizer:
    """Every character is a token, its code the id; 256 is BOS, which ``opens`` a text or not."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    symbols = [chr(byte) if byte in kept else chr(next(spare)) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    if opens:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return TextTokenizer(tokenizer.to_str(), TokenizerSpec((257,), 256, CHAT if chat else None))


@pytest.fixture
def tokenizers():
    """The maker of tokenizers."""
    return word_tokenizer


@pytest.fixture
def rng():
    return np.random.default_rng(11)
