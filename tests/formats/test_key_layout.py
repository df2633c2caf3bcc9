import numpy as np
import pytest

from rotquant_tvm.errors import FormatError, UsageError
from rotquant_tvm.formats import KeyLayout, KVFormat, TileLayout


@pytest.mark.parametrize("name", ["f16", "q4_0", "rotor3", "hurwitz4", "dense2.5", "turbo3+qjl", "qjl1"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_tile_is_the_k_sections_of_a_caches(name, head_dim):
    found = KVFormat.parse(name)
    rng = np.random.default_rng(0)
    encoded = found.codec(head_dim).encode(rng.standard_normal((3, 32, head_dim)))
    layout, cache = KeyLayout(found, head_dim), TileLayout(found, found, head_dim)
    tiles = layout.pack(encoded)
    assert tiles.dtype == np.uint8 and tiles.shape == (3, layout.tile_bytes)
    assert layout.tile_bytes == 32 * head_dim * found.bits_per_element(head_dim) / 8
    both = cache.pack(encoded, encoded)
    for name_, section in layout.sections.items():
        there = cache.sections[name_]
        expected = both[:, there.offset : there.offset + there.nbytes]
        np.testing.assert_array_equal(tiles[:, section.offset : section.offset + section.nbytes], expected)
    back = layout.unpack(tiles)
    np.testing.assert_array_equal(back.codes, encoded.codes)
    np.testing.assert_array_equal(back.gain, encoded.gain)


def test_refusals():
    layout = KeyLayout(KVFormat.parse("rq3"), 64)
    with pytest.raises(UsageError, match=r"tiles are uint8 \[5\]; hurwitz3 at head_dim 64 needs uint8 \[\.\.\., 832\]"):
        layout.unpack(np.zeros(5, np.uint8))
    with pytest.raises(FormatError, match="turbo3 cannot take head_dim 96"):
        KeyLayout(KVFormat.parse("turbo3"), 96)
