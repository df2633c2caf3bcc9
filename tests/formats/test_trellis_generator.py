"""The trellis tables are fixed points of their generator. (Training them anew takes some minutes per bit width.)"""

from pathlib import Path

import numpy as np
import pytest

from rotquant_tvm.formats import trellis_generator as generator
from rotquant_tvm.formats import trellis_tables
from rotquant_tvm.formats.trellis_tables import TABLES


def frozen(bits):
    """The frozen table, for coordinates of variance 1."""
    scale, half = TABLES[bits]
    return scale * np.concatenate([half, -np.array(half)[::-1]])


@pytest.mark.parametrize("bits", generator.BITS)
def test_another_iteration_hardly_improves_a_frozen_table(bits):
    x = generator.samples(1024, generator.HEAD_DIM, seed=5)
    updated, before = generator.lloyd_step(x, frozen(bits), bits)
    _, after = generator.lloyd_step(x, updated, bits)
    assert 0.985 * before < after
    assert np.abs(updated - frozen(bits)).mean() < 0.02


@pytest.mark.parametrize("bits", generator.BITS)
def test_training_makes_headway_and_starts_from_its_seed(bits, monkeypatch):
    monkeypatch.setattr(generator, "VECTORS", 64)
    errors = []
    for iterations in (1, 6):
        monkeypatch.setattr(generator, "ITERATIONS", iterations)
        table = generator.train(bits, 3)
        np.testing.assert_array_equal(table[::-1], -table)
        np.testing.assert_array_equal(table, generator.train(bits, 3))
        errors.append(generator.lloyd_step(generator.samples(64, 128, 1003), table, bits)[1])
    assert errors[1] < 0.95 * errors[0]


def test_a_lloyd_step_is_the_mean_of_what_went_to_each_state():
    """The states' upper halves stand for one value each here, so every sample goes to a state of its own sign."""
    x = generator.samples(32, 64, seed=0)
    assert np.linalg.norm(x, axis=-1) == pytest.approx(8)
    table = np.where(np.arange(256) < 128, -1.0, 1.0)
    updated, error = generator.lloyd_step(x, table, 4)
    assert error == pytest.approx(((np.abs(x) - 1) ** 2).mean(), rel=1e-5)
    np.testing.assert_array_equal(updated[::-1], -updated)
    used = updated[128:] != 1
    assert used.any() and updated[128:][used].min() > 0
    assert np.abs(x).min() <= updated[128:][used].min() and updated.max() <= np.abs(x).max()


def test_the_grid_has_no_0_and_rounds():
    table = np.linspace(-2.0, 2.0, 256)
    scale, half = generator.int8_grid(table)
    assert scale == np.float32(2 / 127) and 0 not in half and min(half) == -127
    assert np.abs(np.array(half) * scale - table[:128]).max() <= 0.51 * scale


def test_the_source_is_the_frozen_file(monkeypatch):
    monkeypatch.setattr(generator, "BITS", (3,))
    monkeypatch.setattr(generator, "train", lambda bits, seed: frozen(bits))
    lines = generator.source().splitlines()
    text = Path(trellis_tables.__file__).read_text()
    assert text.startswith(lines[0]) and "\n".join(lines[3:-1]) in text
