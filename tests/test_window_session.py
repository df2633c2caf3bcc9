"""Sessions of small models with sliding windows: equal to torch however far past the window, in bounded memory.

Caches are of 16 bits, so that logits are torch's but for the rounding of keys and values; how much a window of one
token more or less would change them says that the window is the right one.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import transformers

import rotquant_tvm
from rotquant_tvm.errors import DeviceError, UsageError

from .sampling import sampled

SIZES = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 32}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW, CAPACITY, KEPT = 40, 400, 96
KINDS = {
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma3": (
        "Gemma3Text",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 64,
        },
    ),
}
MODELS = sampled(KINDS, ["gemma3"])
"""The ordinary run takes the one that has both local and global layers."""
IDS = np.random.default_rng(2).integers(3, 61, (3, 260))


@cache
def torch_model(kind: str) -> torch.nn.Module:
    """A random model."""
    torch.manual_seed(0)
    name, options = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**SIZES | options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15).add_(0.5 if parameter.ndim == 1 else 0.0)
    return model


@cache
def compiled(kind: str, kv_cache: str) -> rotquant_tvm.CompiledModel:
    """The model with such a cache."""
    return rotquant_tvm.compile(torch_model(kind), kv_cache, capacity=CAPACITY)


@cache
def library(kind: str, kv_cache: str):
    return compiled(kind, kv_cache).library()


@cache
def expected(kind: str, window: int = WINDOW) -> np.ndarray:
    """torch's logits after every token of ``IDS``."""
    model = torch_model(kind)
    model.config.sliding_window = window
    with torch.no_grad():
        logits = model(torch.tensor(IDS)).logits.float().numpy()
    model.config.sliding_window = WINDOW
    return logits


def check_logits(kind: str, logits: np.ndarray, lengths) -> None:
    """Compare logits [batch, vocab] after so many tokens of each row."""
    for row, (found, length) in enumerate(zip(logits, lengths, strict=True)):
        exact = expected(kind)[row, length - 1]
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        assert error < 2e-3, (row, length, error)


def test_another_window_would_be_noticed():
    """The limit of ``check_logits`` is far below what a token more or less makes."""
    for kind in KINDS:
        exact = expected(kind)[:, 100:]
        for window in (WINDOW - 1, WINDOW + 1):
            change = np.linalg.norm(expected(kind, window)[:, 100:] - exact, axis=-1)
            assert np.median(change / np.linalg.norm(exact, axis=-1)) > 1e-2


class Rows:
    """Feeds a session of three sequences their rows of ``IDS``, and checks the logits."""

    def __init__(self, kind: str, session) -> None:
        self.kind, self.session = kind, session

    def prefill(self, counts) -> None:
        rows = [IDS[r, n : n + count] for r, (n, count) in enumerate(zip(self.session.lengths, counts, strict=True))]
        logits = self.session.prefill(rows)
        taken = [r for r, count in enumerate(counts) if count]
        self._check(logits, taken)

    def decode(self, steps: int, active=(True, True, True)) -> None:
        for _ in range(steps):
            logits = self.session.decode([IDS[r, n] for r, n in enumerate(self.session.lengths)], active)
            self._check(logits, np.flatnonzero(active))

    def _check(self, logits, taken) -> None:
        for row in taken:
            exact = expected(self.kind)[row, self.session.lengths[row] - 1]
            error = np.linalg.norm(logits[row] - exact) / np.linalg.norm(exact)
            assert error < 2e-3, (row, self.session.lengths[row], error)


@pytest.mark.full
@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_torchs(kind):
    """Two chunks across the window, one longer than a ring, steps across turns of it, ragged all the way."""
    session = library(kind, "f16").session(batch=3)
    rows = Rows(kind, session)
    rows.prefill([30, 1, 0])
    rows.prefill([50, 0, 33])
    rows.decode(3)
    rows.prefill([5, 150, 100])
    rows.decode(36)
    rows.decode(30, active=[True, False, True])
    rows.prefill([1, 20, 40])
    rows.decode(3)
    assert session.lengths.tolist() == [158, 213, 245]


@pytest.mark.parametrize("chunk", [1, 64, pytest.param(200, marks=pytest.mark.full)])
def test_the_size_of_chunks_does_not_matter(chunk):
    session = library("gemma3", "f16").session(batch=3, chunk=chunk)
    rows = Rows("gemma3", session)
    rows.prefill([130, 40, 90])
    rows.decode(2)


@pytest.mark.parametrize("kind", MODELS)
def test_memory_is_bounded_by_the_window(kind):
    """The arrays as they are: those of local layers stop growing, those of others do not."""
    local = [name == "sliding_attention" for name in KINDS[kind][1].get("layer_types", ["sliding_attention"] * 2)]
    for capacity in (20, 64, 96, 97, 400):
        session = library(kind, "f16").session(batch=2, capacity=capacity)
        tiles = [layer.shape[2] for layer in session.cache.layers]
        assert tiles == [-(-(min(capacity, KEPT) if bounded else capacity) // 32) for bounded in local]
        live = sum(layer.numpy().nbytes for layer in session.cache.layers)
        assert session.kv_bytes() == live == session.info.cache_bytes(2, capacity)
    report = compiled(kind, "f16").report
    assert [layer["tokens_kept"] for layer in report["layers"]] == [KEPT if bounded else None for bounded in local]
    tile = 2 * 32 * 32 * 4
    for tokens in (8192, 32768):
        sizes = [tile * (KEPT if bounded else tokens) // 32 for bounded in local]
        assert [layer["cache_bytes"][str(tokens)] for layer in report["layers"]] == sizes
        assert report["cache_bytes"][str(tokens)] == sum(sizes) == session.info.cache_bytes(1, tokens)


def test_a_crop_goes_back_as_far_as_the_window_is_held():
    """To the shortest length that is said, and on from there as torch does; not to one token less."""
    session = library("gemma3", "f16").session(batch=3)
    rows = Rows("gemma3", session)
    rows.prefill([200, 97, 90])
    # 200 tokens: tiles 4, 5 and 6, from position 128 on, are held; 97: from 32 on; 90: all.
    assert session.shortest_crop().tolist() == [128 + 39, 32 + 39, 0]
    with pytest.raises(UsageError, match=r"crop\(.*\): layers with a window of 40 tokens keep only the last ones of "):
        session.crop([166, 97, 90])
    with pytest.raises(UsageError, match="sequence 1, which holds 97; crop to 71 or more, or to 0 and prefill again"):
        session.crop([167, 70, 1])
    with pytest.raises(UsageError, match="sequence 0, which holds 200; crop to 167 or more"):
        session.crop(166)
    assert session.lengths.tolist() == [200, 97, 90]
    child = session.fork()
    session.crop([167, 71, 1])
    rows.decode(60)
    assert session.shortest_crop().tolist() == [160 + 39, 64 + 39, 0]  # 227, 131 and 61 tokens
    child.reorder([2, 0])
    assert child.shortest_crop().tolist() == [0, 167]
    with pytest.raises(UsageError, match="sequence 1, which holds 200; crop to 167"):
        child.crop([3, 166])
    child.crop([3, 0])
    assert child.shortest_crop().tolist() == [0, 0] and child.lengths.tolist() == [3, 0]


def test_a_crop_does_not_bring_back_what_was_given_up():
    session = library("gemma3", "f16").session()
    ids = IDS[0]
    session.prefill(ids[:200])
    session.crop(170)
    session.prefill(ids[170:180])
    assert session.shortest_crop().tolist() == [167]
    with pytest.raises(UsageError):
        session.crop(166)
    session.crop(0)
    session.prefill(ids[:50])
    session.crop(7)
    check_logits("gemma3", session.prefill(ids[7:60]), [60])


class Failing:
    """A virtual machine whose prefill fails after the calls numbered up to ``calls``, with its work done."""

    def __init__(self, machine, calls: int) -> None:
        self.machine, self.calls = machine, calls

    def __getitem__(self, name):
        def run(*arguments):
            result = self.machine[name](*arguments)
            self.calls -= 1
            if self.calls < 0:
                raise RuntimeError("out of registers")
            return result

        return run


@pytest.mark.parametrize(("calls", "lost"), [(0, [False, True, False]), (2, [True, True, False])])
def test_a_failed_prefill_empties_what_has_lost_its_window(calls, lost):
    """Row 0 has few tokens in each chunk; row 1 loses its window at once; row 2 takes none."""
    session = library("gemma3", "f16").session(batch=3, chunk=70)
    rows = Rows("gemma3", session)
    rows.prefill([90, 90, 60])
    machine, session._machine = session._machine, Failing(session._machine, calls)
    with pytest.raises(DeviceError, match="out of registers"):
        session.prefill([IDS[0, 90 : 95 if calls == 0 else 260], IDS[1, 90:260], []])
    session._machine = machine
    assert session.lengths.tolist() == [0 if gone else length for gone, length in zip(lost, [90, 90, 60], strict=True)]
    assert session.cache.device_lengths().tolist() == session.lengths.tolist()
    rows.prefill([20, 50, 10])
    rows.decode(2)


def test_a_saved_session_goes_on(tmp_path):
    """With the ring as it stands, into a larger and a smaller cache; what was given up is known."""
    session = library("gemma3", "f16").session(batch=3)
    rows = Rows("gemma3", session)
    rows.prefill([200, 97, 30])
    session.crop([180, 97, 30])
    session.save(tmp_path / "prefix.kv")
    for capacity in (None, 500, 190):
        restored = library("gemma3", "f16").restore(tmp_path / "prefix.kv", capacity)
        assert restored.lengths.tolist() == [180, 97, 30]
        assert restored.shortest_crop().tolist() == session.shortest_crop().tolist() == [167, 71, 0]
        rows = Rows("gemma3", restored)
        rows.decode(5)
    session.crop([167, 80, 0])
    session.crop([180 - 13, 71, 0])
    session.save(tmp_path / "prefix.kv")
    rows = Rows("gemma3", library("gemma3", "f16").restore(tmp_path / "prefix.kv"))
    rows.decode(50)
