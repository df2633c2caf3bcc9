"""Small random models compiled end to end for this CPU, against torch over the compiled cache's own keys and values.

Two float32 computations differ in their last bits, which now and then moves a code across a boundary, and from there on
they drift apart; so torch reads the past from the compiled cache, one step at a time.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache
from tvm import relax

import rotquant_tvm
from rotquant_tvm import compiler, linker
from rotquant_tvm.errors import DeviceError, FormatError, ModelError, RotQuantError, UsageError
from rotquant_tvm.formats import TileLayout
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.pass_hooks import PassHooks
from rotquant_tvm.pipeline import pass_names
from rotquant_tvm.report import cache_bytes

from .ops.reference import unpack_words
from .sampling import sampled

SIZES = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 32}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# model, formats, layer overrides
CASES = {
    "f16": ("Llama", "f16", None),
    "rq3": ("Llama", "hurwitz3", None),
    "iso3-planar3": ("Llama", "iso3/planar3", None),
    "layers": ("Llama", "turbo2", "0=f16;-1=q8_0/rotor4"),
    "window": ("Mistral", "hurwitz4/q8_0", None),
}
CAPACITY = 64


@cache
def torch_model(kind: str) -> transformers.PreTrainedModel:
    """A random model of a transformers class; Mistral with a window of 9 tokens."""
    torch.manual_seed(0)
    options = {"sliding_window": 9} if kind == "Mistral" else {}
    config = getattr(transformers, f"{kind}Config")(**SIZES | options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15).add_(0.5 if parameter.ndim == 1 else 0.0)
    return model


@cache
def compiled(case: str) -> rotquant_tvm.CompiledModel:
    kind, formats, layers = CASES[case]
    return rotquant_tvm.compile(torch_model(kind), formats, kv_layers=layers, capacity=CAPACITY)


class StoredCache(DynamicCache):
    """A torch cache whose past, and in decode the new token too, is what a compiled cache holds of one sequence."""

    def __init__(self, pasts, new=None):
        super().__init__()
        self.new = None
        for layer, (k, v) in enumerate(pasts):
            self.update(k, v, layer)
        self.new = new

    def update(self, key, value, layer, *args, **kwargs):
        if self.new is not None:
            key, value = self.new[layer]
        return super().update(key, value, layer, *args, **kwargs)


def held(session, config, row: int, start: int, stop: int):
    """A sequence's stored keys and values: per layer k, v [1, kv_heads, tokens, head_dim]."""
    result = []
    for index, words in enumerate(session.cache.layers):
        codecs = config.codecs(index, len(session.cache.layers), SIZES["head_dim"])
        layout = TileLayout(codecs[0].format, codecs[1].format, SIZES["head_dim"])
        parts = zip(codecs, unpack_words(layout, words.numpy()), strict=True)
        decoded = [codec.decode(encoded)[row : row + 1, :, start:stop] for codec, encoded in parts]
        result.append([torch.tensor(x, dtype=torch.float32) for x in decoded])
    return result


def expected(case: str, session, ids: list[int], row: int, start: int, decode: bool) -> np.ndarray:
    """Torch's logits after ``ids`` were appended to a sequence of ``start`` tokens."""
    kind, *formats = CASES[case]
    config = KVCacheConfig.parse(*formats)
    new = held(session, config, row, start, start + 1) if decode else None
    past = StoredCache(held(session, config, row, 0, start) if start else [], new)
    positions = torch.arange(start, start + len(ids))[None]
    with torch.no_grad():
        output = torch_model(kind)(torch.tensor([ids]), position_ids=positions, past_key_values=past, use_cache=True)
    return output.logits[0, -1].numpy()


def steps(rng):
    """Ragged prefills and decode steps: ids of each row, and whether it is decode."""
    for counts in ([17, 3, 1], [5, 30, 0], [1, 1, 1], [1, 1, 1], [2, 0, 33], [1, 1, 1]):
        yield [rng.integers(3, 61, count).tolist() for count in counts], set(counts) == {1}


@pytest.mark.parametrize("case", sampled(CASES, ["rq3"]))
def test_logits_are_torchs_over_the_same_cache(case):
    session = compiled(case).session(batch=3)
    assert session.capacity == CAPACITY
    for rows, decode in steps(np.random.default_rng(5)):
        before = session.lengths
        logits = session.decode([row[0] for row in rows]) if decode else session.prefill(rows)
        for row, ids in enumerate(rows):
            if ids:
                wanted = expected(case, session, ids, row, int(before[row]), decode)
                np.testing.assert_allclose(logits[row], wanted, atol=3e-4)


def test_an_f16_cache_is_torchs_own_cache():
    session = compiled("f16").session(batch=2)
    ids = np.random.default_rng(6).integers(3, 61, (2, 40))
    logits = [session.prefill(ids[:, :30]), *(session.decode(ids[:, i]) for i in range(30, 40))]
    with torch.no_grad():
        wanted = torch_model("Llama")(torch.tensor(ids)).logits.numpy()
    for i, found in enumerate(logits):
        np.testing.assert_allclose(found, wanted[:, 29 + i], atol=1e-2)


@pytest.mark.parametrize("case", sampled(CASES, ["rq3", "f16"]))
def test_bytes_are_the_reports(case):
    model = compiled(case)
    session = model.session(batch=3)
    assert session.kv_bytes() == 3 * cache_bytes(model.info, CAPACITY)
    assert session.kv_bytes() == 3 * CAPACITY * model.report["bytes_per_token"]
    assert model.report["layers_rewritten"] == 2 and model.report["model_type"] == CASES[case][0].lower()


@pytest.mark.full
def test_the_report_of_layer_overrides():
    report = compiled("layers").report
    assert [(layer["k"], layer["v"]) for layer in report["layers"]] == [("f16", "f16"), ("q8_0", "rotor4")]
    assert report["bits_per_element"] == pytest.approx((2 * 16 + 8.5 + 4.5) / 4)
    assert {"kv_append", "kv_advance", "kv_attention_decode", "kv_attention_prefill"} <= set(report["kernels"])
    assert compiled("rq3").info["max_position"] == 128


def test_the_report_names_each_layers_kernels():
    report = compiled("layers").report
    used = [{kernel["operator"]: kernel["kernel"] for kernel in layer["kernels"]} for layer in report["layers"]]
    for operator in ("append", "attention_prefill", "attention_decode"):
        assert used[0][operator] != used[1][operator]
        assert {used[0][operator], used[1][operator]} <= set(report["kernels"])
    assert "kv_cache_info" not in report["kernels"]  # a function, not a kernel


def test_the_report_has_the_seconds_of_the_pipelines_passes():
    report = compiled("rq3").report
    assert {"FindAttention", "QuantizeKVCache", "LowerKVOps", "FuseTIR"} <= set(report["pass_seconds"])
    assert set(report["pass_seconds"]) <= set(pass_names(compiled("rq3").target))
    stages = report["seconds"]["rewrite the KV cache"] + report["seconds"]["schedule"]
    assert 0 < sum(report["pass_seconds"].values()) <= stages + 0.02


def test_a_fixed_batch():
    """The library computes the same for that batch, and refuses every other by name."""
    fixed = rotquant_tvm.compile(_imported(), "hurwitz3", capacity=CAPACITY, input_shapes={"ids": [2, -1]})
    assert fixed.info["batch"] == fixed.report["batch"] == 2 and "batch" not in compiled("rq3").info
    library = fixed.library()
    session, free = library.session(), compiled("rq3").session(batch=2)
    assert session.batch == 2
    for rows in ([[3, 4, 5], [6]], [[7], list(range(8, 48))]):
        np.testing.assert_allclose(session.prefill(rows), free.prefill(rows), atol=2e-6)
    np.testing.assert_allclose(session.decode([10, 11]), free.decode([10, 11]), atol=2e-6)
    for refused in (
        lambda: library.session(batch=3),
        lambda: session.reset(batch=1),
        lambda: session.reorder([0]),
        lambda: session.generate([3, 4], max_tokens=1),
    ):
        with pytest.raises(UsageError, match=r"compiled for a batch of 2 .*use batch=2"):
            refused()
    np.testing.assert_array_equal(session.lengths, [5, 42])
    assert len(session.generate([[3, 4], [5]], max_tokens=2)) == 2


def test_a_batch_that_the_import_has_fixed_otherwise():
    imported = _imported()
    size = imported.mod["main"].params[0].ty.shape[0]
    single = dataclasses.replace(imported, mod=relax.transform.BindSymbolicVars({size: 1}, "main")(imported.mod))
    assert compiler._with_batch(single.mod, 1).same_as(single.mod)
    with pytest.raises(UsageError, match="batch is 2, and the model was imported for 1"):
        compiler._with_batch(single.mod, 2)


def test_a_saved_model_computes_the_same(tmp_path):
    model = compiled("rq3")
    artifact = model.save(tmp_path / "model")
    session, loaded = model.session(batch=2), rotquant_tvm.load(artifact.path, batch=2)
    assert loaded.capacity == CAPACITY and loaded.report["layers"] == model.report["layers"]
    for rows in ([[3, 4, 5], [6]], [[7], [8, 9]]):
        np.testing.assert_array_equal(loaded.prefill(rows), session.prefill(rows))
    np.testing.assert_array_equal(loaded.decode([10, 11]), session.decode([10, 11]))


def test_saving_without_a_compiler_is_a_device_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DeviceError, match="pip install ziglang"):
        compiled("rq3").save(tmp_path / "new" / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_limit_is_noted_and_the_modules_attributes_stay():
    imported = _imported()
    marked = dataclasses.replace(imported, mod=imported.mod.with_attr("mark", 7))
    limited = compiler._with_limit(marked)
    assert limited.attrs["mark"] == 7 and limited["main"].attrs["rotquant.max_position"] == 128
    assert "rotquant.max_position" not in (imported.mod["main"].attrs or {})


def test_sessions_of_one_library_are_independent():
    library = compiled("rq3").library()
    one, two = library.session(), library.session()
    first = one.prefill([[5, 6, 7]])
    two.prefill([[9, 10, 11, 12]])
    np.testing.assert_array_equal(two.lengths, [4])
    one.reset()
    np.testing.assert_array_equal(one.prefill([[5, 6, 7]]), first)


@pytest.mark.full
def test_half_precision_weights():
    model = torch_model("Llama")
    session = rotquant_tvm.compile(_halved(model), "q8_0").session()
    ids = np.random.default_rng(7).integers(3, 61, 24)
    found = [session.prefill([ids[:20]]), *(session.decode(ids[i : i + 1]) for i in range(20, 24))]
    with torch.no_grad():
        wanted = model(torch.tensor(ids[None])).logits[0].numpy()
    for i, logits in enumerate(found):
        assert logits.dtype == np.float32
        assert np.linalg.norm(logits - wanted[19 + i]) <= 0.03 * np.linalg.norm(wanted[19 + i])


def _halved(model):
    half = transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    half.load_state_dict(model.state_dict())
    return half.half().eval()


def test_stages_and_passes_are_told():
    stages, passes = [], []
    hooks = PassHooks(before=lambda name, _: passes.append(name))
    model = rotquant_tvm.compile(torch_model("Llama"), "f16", hooks=hooks, progress=stages.append)
    assert stages == ["import", "rewrite the KV cache", "pack weights", "schedule", "generate code"]
    assert set(model.report["seconds"]) == set(stages)
    ours = ["FindAttention", "QuantizeKVCache", "HoistRotation", "LowerKVOps"]
    assert [name for name in passes if name in ours] == ours
    assert model.default_capacity == SIZES["max_position_embeddings"]  # less than the usual one
    assert model.report["default_capacity"] == model.default_capacity


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kv_cache": "rq9"}, FormatError, "unknown KV format 'rq9'"),
        ({"input_shapes": {"ids": [1, 64]}}, UsageError, "seq is fixed to 64"),
        ({"input_shapes": {"tokens": [1, -1]}}, UsageError, "no input 'tokens'"),
        ({"kv_cache": "rq3", "capacity": 0}, UsageError, "the capacity is 0 tokens; it must be 1 or more"),
        ({"kv_cache": "rq3", "capacity": 10**15}, UsageError, "must be 1 or more and at most 2147483647"),
        ({"kv_cache": "rq3", "target": "opencl"}, UsageError, "opencl"),
        ({"kv_cache": "rq3", "kv_layers": "2=f16"}, UsageError, "layer override 2: the model has layers 0 to 1"),
        ({"kv_cache": "rq3", "kv_layers": "1=f16;-1=q8_0"}, UsageError, "layer 1 of 2 is f16 as 1 and q8_0 as -1"),
        ({"kv_cache": "rq3", "kv_layers": "x=f16"}, UsageError, "cannot read the layer overrides 'x=f16'"),
        ({"kv_cache": KVCacheConfig.parse("rq3"), "kv_layers": "0=f16"}, UsageError, "kv_layers"),
        ({"hooks": PassHooks(disabled=["QuantizeKVCache"])}, UsageError, "QuantizeKVCache cannot be disabled"),
        ({"hooks": PassHooks(disabled=["HoistRotation"])}, RotQuantError, "LowerKVOps needs HoistRotation"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        rotquant_tvm.compile(_imported(), **arguments)


@cache
def _imported():
    return rotquant_tvm.import_model(torch_model("Llama"))


def test_a_head_dim_that_a_format_cannot_take():
    config = transformers.LlamaConfig(**SIZES | {"head_dim": 24, "num_hidden_layers": 1})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(FormatError, match=r"cannot take head_dim 24.*no format takes another"):
        rotquant_tvm.compile(model, "rq3")


def test_a_source_that_is_no_model(tmp_path):
    with pytest.raises(ModelError):
        rotquant_tvm.compile(tmp_path / "nothing")
