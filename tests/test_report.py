"""The compile report: true bits and bytes."""

from __future__ import annotations

import json

import pytest
import tvm

from rotquant_tvm.formats import TileLayout, parse_pair
from rotquant_tvm.ops import Axes, advance
from rotquant_tvm.report import cache_bytes, compile_report, true_bits


def info(*layers):
    """What ``kv_cache_info`` says of layers (formats, head_dim, kv_heads)."""
    described = []
    for pair, head_dim, kv_heads in layers:
        k, v = parse_pair(pair)
        tile = TileLayout(k, v, head_dim).tile_bytes
        layer = {"kv_heads": kv_heads, "head_dim": head_dim, "k": k.name, "v": v.name, "tile_bytes": tile}
        described.append(layer)
    versions = {"version": 2, "layout_version": 1, "vocab_size": 9, "max_position": 4096, "dtype": "float32"}
    return versions | {"layers": described, "weights": []}


def report(*layers, mod=None):
    target = tvm.target.Target("llvm")
    seconds = ({"import": 1.2345}, mod or tvm.IRModule(), {"FuseTIR": 0.12345})
    return compile_report(info(*layers), {"model_type": "llama"}, target, *seconds)


@pytest.mark.parametrize(
    ("pair", "head_dim", "bits", "compression"),
    [
        ("f16", 128, 16, 1),
        ("rq3", 128, 3.125, 5.12),
        ("rq2", 128, 2.125, 7.529),
        ("rq4", 128, 4.125, 3.879),
        ("rq3", 64, 3.25, 4.923),
        ("planar3/f16", 128, 9.5625, 1.673),
        ("q8_0", 128, 8.5, 1.882),
    ],
)
def test_true_bits(pair, head_dim, bits, compression):
    """Gains counted: METHODS' figures, not those that the papers print."""
    found = report((pair, head_dim, 2), (pair, head_dim, 2))
    assert found["bits_per_element"] == pytest.approx(bits)
    assert found["compression"] == pytest.approx(compression, rel=1e-3)
    assert found["f16_bytes_per_token"] == 2 * 2 * head_dim * 2 * 2


def test_every_segment_counts():
    """Tiles, centres, sinks and ring, as they are allocated, by hand."""
    document = info(("hurwitz3", 64, 3))
    document["layers"][0]["policy"] = {"sinks": 4, "recent": 8, "center": 64, "defer": 0}
    for tokens, tiles in ((1024, 30), (8192, 254), (70, 2)):
        nbytes = 3 * (tiles * 32 * (2 * 64 * 3 // 8 + 4) + tiles // 2 * (64 + 4) + 2 * 2 * 64 * (4 + 8 + 64))
        assert cache_bytes(document, tokens) == nbytes
        assert true_bits(document, tokens) == pytest.approx(8 * nbytes / (tokens * 3 * 64 * 2))
    found = compile_report(document, {"model_type": "llama"}, tvm.target.Target("llvm"), {}, tvm.IRModule())
    layer = found["layers"][0]
    assert layer["policy"] == "sinks=4,recent=8,center=64"
    assert layer["k_bits"] == pytest.approx(3.25 + (64 + 4) * 8 / (64 * 64)) and layer["v_bits"] == 3.25
    assert found["true_bits"]["8192"] == true_bits(document, 8192)


def test_a_window_bounds_the_bytes():
    """Of its layer alone; by hand: 40 tokens lie in two tiles, and one more is being filled."""
    document = info(("hurwitz3", 64, 3), ("f16", 64, 1))
    document["layers"][0] |= {"window": 40, "tokens_kept": 96}
    tile, whole = (layer["tile_bytes"] for layer in document["layers"])
    found = compile_report(document, {"model_type": "llama"}, tvm.target.Target("llvm"), {}, tvm.IRModule())
    local, everywhere = found["layers"]
    assert (local["window"], local["tokens_kept"], everywhere["tokens_kept"]) == (40, 96, None)
    for tokens in (1024, 8192, 32768):
        assert local["cache_bytes"][str(tokens)] == 3 * 3 * tile
        assert everywhere["cache_bytes"][str(tokens)] == whole * tokens // 32
        assert found["cache_bytes"][str(tokens)] == cache_bytes(document, tokens) == 9 * tile + whole * tokens // 32
        assert found["f16_cache_bytes"][str(tokens)] == (3 + 1) * 64 * 4 * tokens
    assert cache_bytes(document, 33) == 2 * (3 * tile + whole)  # fewer tokens than the ring holds


def test_layers_are_described_one_by_one():
    found = report(("iso3/planar2", 64, 3), ("f16", 64, 3))
    first, second = found["layers"]
    assert (first["layer"], first["k"], first["v"]) == (0, "iso3", "planar2")
    assert (first["kv_heads"], first["head_dim"]) == (3, 64)
    assert (first["k_bits"], first["v_bits"]) == (3.25, 2.25) and (second["k_bits"], second["v_bits"]) == (16, 16)
    assert first["bytes_per_token"] == 3 * 64 * (3.25 + 2.25) / 8
    assert found["bytes_per_token"] == first["bytes_per_token"] + second["bytes_per_token"]
    assert found["layers_rewritten"] == 2 and found["model_type"] == "llama"


def test_kernels_times_and_target():
    kernel = advance(Axes("llvm"))
    mod = tvm.IRModule({"kv_advance": kernel, "other": kernel.without_attr("rotquant.op")})
    found = report(("rq3", 64, 1), mod=mod)
    assert found["kernels"] == ["kv_advance"]
    assert found["seconds"] == {"import": 1.23} and found["pass_seconds"] == {"FuseTIR": 0.1235}
    assert "llvm" in found["target"]


def test_a_fixed_batch_is_told():
    described = info(("rq3", 64, 1))
    for batch in (None, 3):
        fixed = described | ({} if batch is None else {"batch": batch})
        found = compile_report(fixed, {"model_type": "llama"}, tvm.target.Target("llvm"), {}, tvm.IRModule())
        assert found["batch"] == batch


def test_it_is_plain_data():
    found = report(("rq3", 64, 1))
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(("tokens", "tiles"), [(0, 0), (1, 1), (32, 1), (33, 2), (4096, 128)])
def test_a_cache_takes_whole_tiles(tokens, tiles):
    described = info(("rq3", 64, 3), ("f16/q8_0", 128, 1))
    sizes = [3 * described["layers"][0]["tile_bytes"], described["layers"][1]["tile_bytes"]]
    assert cache_bytes(described, tokens) == tiles * sum(sizes)
