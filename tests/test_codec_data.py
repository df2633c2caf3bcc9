"""Rotations and codebooks as data: ``examples/decode_cache.py``, which has nothing else, decodes every format."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from rotquant_tvm.codec_data import codec_data
from rotquant_tvm.formats import TOKENS, KVFormat, TileLayout, known_formats
from rotquant_tvm.kv_cache_config import KVCacheConfig

from .sampling import sampled

EXAMPLE = Path(__file__).parents[1] / "examples" / "decode_cache.py"
FORMATS = sorted({fmt.name for fmt in known_formats().values() if not fmt.sketched})

CHOSEN = ("f16", "bf16", "q8_0", "q4_0", "hurwitz3", "hurwitz2+tcq", "planar4", "rotor3", "turbo2.5", "dense3.5")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("decode_cache_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def info_of(config: KVCacheConfig, head_dims) -> dict:
    layers = []
    for index, head_dim in enumerate(head_dims):
        formats = config.layer(index, len(head_dims))
        layers.append({"k": formats.k.name, "v": formats.v.name, "head_dim": head_dim, "kv_heads": 1})
    return {"layers": layers, "layout_version": 1}


def written(info: dict, data, folder: Path) -> Path:
    """An artifact's manifest and codecs, without the rest."""
    data.write(folder / "codecs.safetensors")
    manifest = {"version": 2, "kv_cache_info": info, "codecs": data.document()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def taken_dims(name: str) -> list[int]:
    return [dim for dim in (32, 48, 64, 128) if not _refuses(name, dim)]


def _refuses(name: str, dim: int) -> bool:
    try:
        KVFormat.parse(name).check(dim)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("name", sampled(FORMATS, CHOSEN))
def test_the_example_decodes_every_format(example, name, tmp_path):
    """Keys and values of one format, in layers of several head dimensions, each with rotations of its own."""
    dims = taken_dims(name)
    config = KVCacheConfig.parse(name, seed=7)
    info = info_of(config, dims)
    artifact = example.Artifact(written(info, codec_data(info, config), tmp_path))
    rng = np.random.default_rng(len(name))
    for index, dim in enumerate(dims):
        codecs = config.codecs(index, len(dims), dim)
        x = rng.standard_normal((2, 1, TOKENS, dim)).astype(np.float32)
        encoded = [codec.encode(x[role]) for role, codec in enumerate(codecs)]
        tiles = TileLayout(codecs[0].format, codecs[1].format, dim).pack(*encoded)
        for role, codec in enumerate(codecs):
            rotated = artifact.rotated(tiles, index, "kv"[role])
            np.testing.assert_allclose(rotated, codec.decode_rotated(encoded[role]), rtol=2e-6, atol=1e-7)
            matrix = artifact.rotation(artifact.codecs[index]["kv"[role]])
            if matrix is None:
                assert codec.rotation.identity
            else:
                np.testing.assert_allclose(matrix, codec.rotation.matrix(), atol=1e-6)


def test_layers_share_what_is_the_same():
    config = KVCacheConfig.parse("iso3/planar3")
    data = codec_data(info_of(config, [64, 64, 64]), config)
    names = [name.partition(".")[0] for name in data.arrays]
    assert names.count("values") == 1 and names.count("positions") == 3  # K, V, gains
    assert names.count("rotation") == 6


def test_what_stays_in_16_bits_is_described_as_such():
    config = KVCacheConfig.parse("rq3", "0=f16")
    data = codec_data(info_of(config, [64, 64]), config)
    assert data.layers[0]["k"]["codebook"] == "half" and data.layers[0]["k"]["rotation"] == []
    assert data.layers[1]["k"]["format"] == "hurwitz3:ip" and len(data.layers[1]["k"]["rotation"]) == 3


def test_a_description_of_another_cache_is_noticed():
    config = KVCacheConfig.parse("iso3")
    with pytest.raises(RuntimeError, match="layer 0 has the formats iso3/iso3"):
        codec_data(info_of(config, [64]), KVCacheConfig.parse("iso4"))
