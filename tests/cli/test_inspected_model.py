"""What ``tvmc inspect`` tells of a model: verdicts by format, rotary embeddings, near misses, pictures."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import tvm
from tvm import relax
from tvm.relax import op

from rotquant_tvm.cli.inspect_table import inspected_parts
from rotquant_tvm.cli.inspected_model import InspectedModel
from rotquant_tvm.errors import ModelError, UsageError
from rotquant_tvm.kv_cache_config import KVCacheConfig

from ..passes.fold_models import INTERLEAVED, LLAMA, FoldModel
from ..passes.tiny_model import TinyModel


def inspected(model: TinyModel, text: str = "hurwitz3", on_unsupported: str = "refuse") -> InspectedModel:
    config = KVCacheConfig.parse(text)
    config = replace(config, on_unsupported=on_unsupported)
    mod = model.module()
    return InspectedModel(Path("tiny.onnx"), config, mod, mod, {"model_type": "tiny"})


def verdicts(found: InspectedModel) -> list[tuple[str, str | None, str | None]]:
    return [(site["verdict"], site["k"], site["v"]) for site in found.described]


def shown(found: InspectedModel, only: int | None = None) -> str:
    from rich.console import Console

    console = Console(width=400)
    with console.capture() as capture:
        for part in inspected_parts(found.describe(), only):
            console.print(part)
    return capture.get()


def test_a_site_as_plain_data():
    document = inspected(INTERLEAVED, "planar3/iso4").describe()
    assert json.loads(json.dumps(document)) == document
    (site,) = document["sites"]
    wanted = {"layer": 0, "heads": 4, "kv_heads": 2, "head_dim": 32, "mask": "causal", "window": None, "softcap": None}
    wanted |= {"verdict": "quantize", "reason": "", "k": "planar3", "v": "iso4", "scale": pytest.approx(0.3)}
    wanted |= {"rotary": {"kind": "partial", "dims": 16, "pairs": "interleaved"}}
    assert {name: site[name] for name in wanted} == wanted
    assert document["near_misses"] == [] and document["refused"] is None


@pytest.mark.parametrize(
    ("head_dim", "text", "on_unsupported", "expected"),
    [
        (48, "iso3", "refuse", ("quantize", "iso3", "iso3")),
        (48, "turbo3/iso3", "refuse", ("refuse", "turbo3", "iso3")),
        (48, "turbo3/iso3", "keep", ("keep", "f16", "iso3")),
        (48, "iso3/turbo3", "keep", ("keep", "iso3", "f16")),
        (24, "iso3", "keep", ("refuse", "iso3", "iso3")),  # no format takes it, 16-bit ones neither
    ],
)
def test_verdicts_depend_on_the_format(head_dim, text, on_unsupported, expected):
    found = inspected(FoldModel(layers=2, head_dim=head_dim), text, on_unsupported)
    assert verdicts(found) == [expected] * 2
    reasons = {site["reason"] for site in found.described}
    assert all(f"cannot take head_dim {head_dim}" in reason for reason in reasons) or expected[0] == "quantize"
    remedy = "--kv-on-unsupported keep"
    assert all((remedy in reason) == (head_dim == 48 and expected[0] == "refuse") for reason in reasons)


class Uncausal(TinyModel):
    def attend(self, bb, q, k, v):
        k, v = (bb.emit(op.permute_dims(x, [0, 2, 1, 3])) for x in (k, v))
        return bb.emit(op.nn.attention(q, k, v, scale=self.scale))


def test_what_cannot_be_rewritten_stays_refused():
    for on_unsupported in ("refuse", "keep"):
        (site,) = inspected(Uncausal(layers=1), on_unsupported=on_unsupported).described
        assert (site["verdict"], site["reason"], site["k"]) == ("refuse", "it is not causal", None)


def test_the_table():
    text = shown(inspected(FoldModel(rotary="half-split", window=9, softcap=30.0), "turbo3/f16"))
    assert "window 9" in text and "full, half-split" in text and "turbo3" in text and "30" in text
    assert "tiny: 1 of 1 attention sites can have a packed KV cache" in text
    assert "partial 16 dims, interleaved" in shown(inspected(INTERLEAVED))
    assert "none" in shown(inspected(TinyModel()))
    kept = shown(inspected(FoldModel(head_dim=48), "turbo3", "keep"))
    assert "0 of 1 attention sites can have a packed KV cache, 1 keep K or V in 16 bits" in kept
    both = inspected(TinyModel())
    assert len(shown(both).splitlines()) == len(shown(both, 1).splitlines()) + 1
    assert "near misses" not in text


class Spelled(TinyModel):
    """Attention as products and a softmax, of scores that no negative number is left of."""

    def attend(self, bb, q, k, v):
        queries = bb.emit(op.permute_dims(q, [0, 2, 1, 3]))
        scores = bb.emit(op.matmul(queries, bb.emit(op.permute_dims(k, [0, 1, 3, 2]))))
        weights = bb.emit(op.nn.softmax(bb.emit(op.nn.relu(scores)), axis=-1))
        return bb.emit(op.permute_dims(bb.emit(op.matmul(weights, v)), [0, 2, 1, 3]))


def test_near_misses_name_the_operator_that_broke_the_match():
    found = inspected(Spelled(layers=1, heads=2, kv_heads=2))
    (miss,) = found.describe()["near_misses"]
    assert miss["operator"] == "relax.nn.relu" and miss["reason"]
    text = shown(found)
    assert miss["reason"] in text and miss["variable"] in text and "0 of 0 attention sites" in text


def panels(svg: bytes) -> list[list[str]]:
    """The labels of the nodes at the left and at the right."""
    space = "{http://www.w3.org/2000/svg}"
    groups = [g for g in ET.fromstring(svg).iter(f"{space}g") if g.get("id", "").startswith("panel-")]
    return [
        [next(g.iter(f"{space}text")).text for g in groups if g.get("id").startswith(f"panel-{number}-")]
        for number in range(2)
    ]


def test_the_dataflow_before_and_after():
    model = inspected(FoldModel(layers=2), "hurwitz3")
    model = replace(model, imported=object())
    before, after = panels(model.picture(1))
    assert {"nn.attention", "concat", "past_k_1", "past_v_1", "w6", "w7", "w8", "w9"} <= set(before)
    assert {"attention_decode", "append", "cache_1"} <= set(after)
    assert not {"past_k_1", "nn.attention", "past_k_0", "cache_0"} & set(after)


def test_a_refused_model_has_one_picture_and_the_reason():
    model = inspected(TinyModel(layers=1, head_dim=48), "turbo3")
    before, after = panels(model.picture(0))
    assert "nn.attention" in before and after == []
    assert b"refused: turbo3 cannot take head_dim 48" in model.picture(0)
    with pytest.raises(UsageError, match="--site 4: the model has 1 attention sites"):
        model.picture(4)
    refused = replace(model, refused=ModelError("no ids"))
    assert b"no ids" in refused.picture(0)
    with pytest.raises(UsageError, match="give --site"):
        refused.picture(None)


def test_a_file_whose_graph_can_be_read_is_described_though_it_is_refused(monkeypatch):
    from rotquant_tvm.cli import inspected_model
    from rotquant_tvm.frontend.step_graph import StepGraph

    graph = StepGraph(Spelled(layers=1, heads=2, kv_heads=2).module(), [], [], [], [], "tiny.onnx", {})

    def refuse(_path):
        raise ModelError("its attention cannot be told")

    monkeypatch.setattr(inspected_model, "import_model", refuse)
    monkeypatch.setattr(inspected_model, "_as_spelled", lambda _path: graph)
    monkeypatch.setattr(inspected_model, "source_format", lambda _path: "onnx")
    found = InspectedModel.read(Path("tiny.onnx"), KVCacheConfig.parse("f16"))
    document = found.describe()
    assert document["refused"] == "its attention cannot be told" and len(document["near_misses"]) == 1
    monkeypatch.setattr(inspected_model, "_as_spelled", lambda _path: None)
    with pytest.raises(ModelError, match="cannot be told"):
        InspectedModel.read(Path("tiny.onnx"), KVCacheConfig.parse("f16"))


def test_weights_that_took_a_rotation_over_are_marked():
    from rotquant_tvm.passes.fold_rotation import FoldRotation
    from rotquant_tvm.passes.hoist_rotation import HoistRotation
    from rotquant_tvm.passes.quantize_kv_cache import QuantizeKVCache

    from rotquant_tvm.cli.site_dataflow import site_dataflow

    with tvm.target.Target("llvm"):
        mod = FoldRotation()(HoistRotation()(QuantizeKVCache(KVCacheConfig.parse("hurwitz3"))(LLAMA.module())))
    weights = [d["label"] for _, d in site_dataflow(mod, "decode", 0).nodes(data=True) if d["kind"] == "weight"]
    assert sorted(weights) == ["w2", "w3", "w4 · rotated", "w5 · rotated"]
    assert isinstance(mod["decode"], relax.Function)
