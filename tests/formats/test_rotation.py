import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotquant_tvm.errors import FormatError, UsageError
from rotquant_tvm.formats import BlockLayer, Rotation, block_reads, rotation_families, rotation_structure

HEAD_DIMS = (64, 80, 96, 128, 256)
CASES = [
    (family, head_dim)
    for family in rotation_families()
    for head_dim in HEAD_DIMS
    if family != "turbo" or head_dim & (head_dim - 1) == 0
]


def test_the_families_are_the_published_ones():
    assert set(rotation_families()) == {
        "none",
        "planar",
        "iso",
        "iso-full",
        "rotor",
        "turbo",
        "dense",
        "hurwitz",
    }


@pytest.mark.parametrize(("family", "head_dim"), CASES)
def test_orthogonal_with_an_inverse_of_the_same_form(family, head_dim):
    rotation = Rotation.draw(family, head_dim, seed=3)
    inverse = rotation.inverse()
    matrix = rotation.matrix()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(head_dim), atol=1e-13)
    np.testing.assert_allclose(inverse.matrix(), matrix.T, atol=1e-15)
    assert inverse.structure == rotation.structure[::-1]
    x = np.random.default_rng(0).standard_normal((2, 5, head_dim))
    np.testing.assert_allclose(rotation.apply(x), x @ matrix.T, atol=1e-13)
    np.testing.assert_allclose(inverse.apply(rotation.apply(x)), x, atol=1e-13)


@pytest.mark.parametrize(("family", "head_dim"), CASES)
def test_the_structure_is_the_familys_and_data_rebuilds_the_rotation(family, head_dim):
    rotation = Rotation.draw(family, head_dim, seed=(1, 2))
    assert rotation.structure == rotation_structure(family, head_dim)
    assert rotation.data.dtype == np.float32
    assert rotation.data.size == sum(head_dim * block for block, _ in rotation.structure)
    rebuilt = Rotation.from_data(head_dim, rotation.structure, rotation.data)
    np.testing.assert_allclose(rebuilt.matrix(), rotation.matrix(), atol=1e-6)
    np.testing.assert_array_equal(rebuilt.data, rotation.data)
    assert rotation.identity == (family == "none")


@pytest.mark.parametrize("family", [family for family in rotation_families() if family != "none"])
def test_draws_follow_the_seed(family):
    data = Rotation.draw(family, 64, 7).data
    np.testing.assert_array_equal(data, Rotation.draw(family, 64, 7).data)
    assert not np.array_equal(data, Rotation.draw(family, 64, 8).data)


@pytest.mark.parametrize(
    ("family", "digest"),
    [
        ("hurwitz", "b5b9ec330ac37b23"),
        ("turbo", "d4367302da81c75f"),
    ],
)
def test_exact_draws_are_frozen(family, digest):
    assert hashlib.sha256(Rotation.draw(family, 64, 0).data.tobytes()).hexdigest()[:16] == digest


def test_apply_keeps_float32_and_computes_the_rest_in_float64():
    rotation = Rotation.draw("hurwitz", 64)
    assert rotation.apply(np.ones(64, np.float32)).dtype == np.float32
    assert rotation.apply(np.ones(64, np.float16)).dtype == np.float64
    assert Rotation(64).apply(np.ones(64, np.float32)).dtype == np.float32


@settings(deadline=None, max_examples=60)
@given(
    block=st.integers(1, 5),
    stride=st.sampled_from((1, 2, 4)),
    count=st.integers(1, 4),
    extra=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_a_layer_is_its_matrix(block, stride, count, extra, seed):
    """The defining sum, entry by entry; ``extra`` makes an overlapping tail at stride 1."""
    head_dim = block * stride * count + (min(extra, block - 1) if stride == 1 else 0)
    coefficients = np.random.default_rng(seed).standard_normal((head_dim, block))
    x = np.random.default_rng(seed + 1).standard_normal(head_dim)
    layer = BlockLayer(block, stride, coefficients)
    for i in range(head_dim):
        if stride == 1:
            base = min(i // block * block, head_dim - block)
        else:
            base = i - ((i // stride) % block) * stride
        expected = sum(coefficients[i, j] * x[base + j * stride] for j in range(block))
        assert (layer.matrix @ x)[i] == pytest.approx(expected)


def test_from_blocks_acts_on_entries_a_stride_apart():
    blocks = np.random.default_rng(0).standard_normal((4, 2, 2))
    x = np.arange(8.0)
    y = BlockLayer.from_blocks(blocks, stride=2).matrix @ x
    np.testing.assert_allclose(y[[0, 2]], blocks[0] @ x[[0, 2]])
    np.testing.assert_allclose(y[[1, 3]], blocks[1] @ x[[1, 3]])
    np.testing.assert_allclose(y[[5, 7]], blocks[3] @ x[[5, 7]])


def test_layers_cannot_be_changed_behind_a_rotation():
    layer = Rotation.draw("iso", 32).layers[0]
    with pytest.raises(ValueError, match="read-only"):
        layer.coefficients[0, 0] = 2.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Rotation.draw("spin", 64), "unknown rotation 'spin'; known: .*hurwitz"),
        (lambda: Rotation.draw("turbo", 96), "power of two.*96.*use hurwitz or dense"),
        (lambda: Rotation.draw("iso", 66), "divisible by 4.*66.*use planar"),
        (lambda: Rotation.draw("iso-full", 66), "divisible by 4.*66.*use planar"),
        (lambda: Rotation.draw("planar", 65), "even head_dim, not 65; use rotor or dense"),
        (lambda: Rotation.draw("rotor", 2), "3 or more, not 2; use planar"),
        (lambda: Rotation.draw("hurwitz", 72), "multiple of 16.*72; use dense"),
        (lambda: Rotation.draw("dense", 0), "1 or more"),
        (lambda: block_reads(80, 4, 16), "multiple of 64, not 80; use another stride"),
        (lambda: block_reads(3, 4, 1), "does not fit head_dim 3"),
        (lambda: BlockLayer(4, 1, np.zeros((8, 3))), r"must be \[d, 4\], not \[8, 3\]"),
        (lambda: Rotation(32, Rotation.draw("iso", 64).layers), "head_dim 64 in a rotation of 32"),
        (lambda: Rotation.from_data(32, ((4, 1),), np.zeros(64)), "64 values, not the 128"),
    ],
)
def test_refusals_say_what_to_use(call, message):
    with pytest.raises(FormatError, match=message):
        call()


def test_bad_arguments():
    with pytest.raises(UsageError, match="seed -1 is negative"):
        Rotation.draw("iso", 64, -1)
    with pytest.raises(UsageError, match=r"shape \[3\].*head_dim 64"):
        Rotation.draw("iso", 64).apply(np.zeros(3))
