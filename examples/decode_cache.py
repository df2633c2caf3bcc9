"""Shows that an artifact says all about its cache: decodes a saved one with NumPy, without this package or TVM.

    python examples/decode_cache.py model.rq prefix.kv keys_and_values.npz

prefix.kv is what ``session.save("prefix.kv")`` wrote (or examples/deploy_python/generate.py --save). The output has
float32 arrays ``k_0``, ``v_0``, ``k_1``, … of [batch, kv_heads, tokens, head_dim], NaN behind the end of shorter
sequences. ``docs/artifact.md`` has the same in words.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

TOKENS = 32  # of a tile


class Artifact:
    """What the manifest and ``codecs.safetensors`` say of the cache."""

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["version"] != 2 or manifest["kv_cache_info"]["layout_version"] != 1:
            raise SystemExit(f"{folder}: an artifact of another version")
        self.layers = manifest["kv_cache_info"]["layers"]
        self.codecs = manifest["codecs"]["layers"]
        self.arrays = load_file(folder / manifest["codecs"]["file"])

    def rotation(self, codec: dict) -> np.ndarray:
        """The matrix R, float64 [d, d]: its layers, one after the other."""
        matrix = None
        for layer in codec["rotation"]:
            coefficients, block, stride = self.arrays[layer["coefficients"]], layer["block"], layer["stride"]
            d = len(coefficients)
            i = np.arange(d)
            base = np.minimum(i // block * block, d - block) if stride == 1 else i - i // stride % block * stride
            step = np.zeros((d, d))
            np.add.at(step, (i[:, None], base[:, None] + np.arange(block) * stride), coefficients)
            matrix = step if matrix is None else step @ matrix
        return matrix

    def bits(self, section: np.ndarray, name: str) -> np.ndarray:
        """Codes [..., 32, dims] whose bits stand in a section, uint8 [..., bytes], where the array ``name`` says."""
        positions = self.arrays[name]
        single = np.unpackbits(section, axis=-1, bitorder="little")[..., positions]
        return (single.astype(np.uint16) << np.arange(positions.shape[-1], dtype=np.uint16)).sum(-1, dtype=np.uint16)

    def rotated(self, tiles: np.ndarray, index: int, role: str) -> np.ndarray:
        """Keys or values in the rotated basis, float32 [..., 32, d], of tiles uint8 [..., tile_bytes]."""
        codec, d = self.codecs[index][role], self.layers[index]["head_dim"]

        def section(name: str) -> np.ndarray:
            offset, size = self.codecs[index]["sections"][f"{role}_{name}"]
            return np.ascontiguousarray(tiles[..., offset : offset + size])

        codes = self.bits(section("codes"), codec["positions"])
        if codec["codebook"] == "half":
            return codes.view(np.float16).astype(np.float32)
        if codec["codebook"] == "bfloat16":
            return (codes.astype(np.uint32) << 16).view(np.float32)
        tables = [self.arrays[name] for name in codec["values"]]
        if codec["codebook"] == "trellis":
            codes = states(codes, codec["bits"])
        values = tables[-1][codes]
        if codec["plane"] is not None:  # the first dims have one bit more, and a table of their own
            dims = codec["plane"]["dims"]
            more = self.bits(section("extra"), codec["plane"]["positions"])
            values[..., :dims] = tables[0][codes[..., :dims] | more << codec["bits"]]
        rows = section("gains").view("<f2").reshape(*tiles.shape[:-1], codec["gains"], TOKENS)
        gains = np.swapaxes(rows[..., self.arrays["positions.gains"]], -1, -2).astype(np.float32)
        block = d if codec["gains"] == 1 else 32
        return values * np.repeat(gains, block, axis=-1)[..., :d]


def states(codes: np.ndarray, bits: int) -> np.ndarray:
    """A trellis' states: the last eight bits of the stream of codes, which is a ring."""
    window = codes.copy()
    for back in range(1, -(-8 // bits)):
        window |= np.roll(codes, back, axis=-1) << (bits * back)
    return window & 255


def centres(words: np.ndarray) -> np.ndarray:
    """Mean keys of blocks, float32 [..., d], of uint32 [..., d/4 + 1]: int8 codes, then a float32 factor."""
    codes = np.ascontiguousarray(words[..., :-1]).view(np.int8).astype(np.float32)
    return codes * np.ascontiguousarray(words[..., -1:]).view(np.float32)


def layer_tokens(artifact: Artifact, index: int, arrays: list[np.ndarray], counts: np.ndarray) -> list[np.ndarray]:
    """Keys and values of a layer, float32 [batch, kv_heads, longest, d] each."""
    layer = artifact.layers[index]
    policy = layer.get("policy")
    tiles = np.ascontiguousarray(arrays[0]).view(np.uint8)
    lengths = counts[-1]
    packed = lengths if policy is None else counts[0]
    if "window" in layer and packed.max() > TOKENS * tiles.shape[2]:
        raise SystemExit(f"layer {index} keeps a window's tokens only, and has given up others")
    found = []
    for role in ("k", "v"):
        shape = (*tiles.shape[:2], -1, layer["head_dim"])
        rotated = artifact.rotated(tiles, index, role).reshape(shape)
        if role == "k" and policy is not None and policy["center"]:
            means = centres(arrays[1])
            rotated[:, :, : policy["center"] * means.shape[2]] += np.repeat(means, policy["center"], axis=2)
        rows = np.full((*shape[:2], int(lengths.max()), shape[3]), np.nan, np.float32)
        for b, (length, in_tiles) in enumerate(zip(lengths, packed, strict=True)):
            sinks = 0 if policy is None else min(policy["sinks"], int(length))
            rows[b, :, sinks : sinks + in_tiles] = rotated[b, :, :in_tiles]
            if policy is not None:
                plain = arrays[-1][b, :, "kv".index(role)].astype(np.float32)
                rows[b, :, :sinks] = plain[:, :sinks]
                ring = plain.shape[1] - policy["sinks"]
                newest = np.arange(sinks + in_tiles, length)
                rows[b, :, newest] = plain[:, policy["sinks"] + (newest - policy["sinks"]) % ring].swapaxes(0, 1)
        rotation = artifact.rotation(artifact.codecs[index][role])
        found.append(rows if rotation is None else (rows @ rotation).astype(np.float32))  # x = Rᵀ y, in rows y R
    return found


def decode(folder: Path, saved: Path) -> dict[str, np.ndarray]:
    """All keys and values of a saved cache."""
    artifact = Artifact(folder)
    with safe_open(saved, framework="np") as file:
        counts = file.get_tensor("counts")
        arrays = [file.get_tensor(name) for name in sorted(set(file.keys()) - {"counts"})]
    found = {}
    for index, layer in enumerate(artifact.layers):
        policy = layer.get("policy")
        count = 1 if policy is None else 2 + bool(policy["center"])  # tiles, centres, 16-bit rows
        mine, arrays = arrays[:count], arrays[count:]
        found[f"k_{index}"], found[f"v_{index}"] = layer_tokens(artifact, index, mine, counts)
    return found


def main() -> None:
    """Decode and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    found = decode(arguments.artifact, arguments.cache)
    np.savez(arguments.output, **found)
    for name, array in found.items():
        print(f"{name}: {list(array.shape)}, rms {np.sqrt(np.nanmean(array.astype(np.float64) ** 2)):.4f}")


if __name__ == "__main__":
    main()
