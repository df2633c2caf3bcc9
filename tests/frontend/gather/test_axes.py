"""Axes as rows of atoms: reshapes split and merge them, and what was noted before stays right."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, tirx

from rotquant_tvm.frontend.gather.axes import AxisSpace, shape_of
from rotquant_tvm.frontend.gather.extents import ExtentTable

B, S = (tirx.Var(name, "int64") for name in "bs")


def space():
    return AxisSpace(ExtentTable())


def extents(own, axis):
    return [atom.extent.constant for atom in own.resolve(axis)]


def test_extents_of_one_have_no_atoms():
    assert space().axes([1, 4, S])[0] == ()


def test_splits_are_seen_through_older_axes():
    own = space()
    merged = own.axis(B * 8)
    batch, heads = own.align(merged, [B, 8])
    kv_heads, group = own.align(heads, [2, 4])
    assert own.resolve(merged) == (*batch, *kv_heads, *group)
    assert own.align(merged, [B * 2, 4]) == ((*batch, *kv_heads), group)


def test_crossing_splits_are_refined():
    own = space()
    axis = own.axis(8)
    own.align(axis, [2, 4])
    first, second = own.align(axis, [4, 2])
    assert (extents(own, first), extents(own, second)) == ([2, 2], [2])


def test_what_does_not_fit():
    own = space()
    assert own.align(own.axis(6), [4, 2]) is None
    assert own.align(own.axis(6), [6, 2]) is None
    assert own.align(own.axis(6), [3]) is None
    assert own.align(own.axis(B), [S]) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_alignment_is_what_reshape_does(shape, random):
    """Atoms stand for the digits of an index: those of a reshaped array's axes are its own, in order."""
    own = space()
    axes = own.axes(shape)
    primes = [prime for size in shape for prime in {1: [], 2: [2], 3: [3], 4: [2, 2]}[size]]
    target = [1]
    for prime in primes:  # any way to merge the primes in order
        target = [*target, prime] if random.random() < 0.5 else [*target[:-1], target[-1] * prime]
    aligned = own.align(own.atoms(axes), target)
    digits = [atom.extent.constant for atom in own.atoms(axes)]
    index = np.arange(np.prod(shape, dtype=int))
    digits_of = np.unravel_index(index, digits) if digits else []
    place = 0
    for size, axis, coordinate in zip(target, aligned, np.unravel_index(index, target), strict=True):
        own_digits = extents(own, axis)
        value = np.zeros_like(index)
        for digit, count in zip(digits_of[place : place + len(own_digits)], own_digits, strict=True):
            value = value * count + digit
        place += len(own_digits)
        assert (value == coordinate).all() and np.prod(own_digits, dtype=int) == size


def test_sizes_and_unknown_shapes():
    own = space()
    axis = own.axis(B * 8)
    own.align(axis, [B, 8])
    assert str(own.size(axis)) == str(B * 8)
    assert shape_of(relax.Var("x", relax.TensorType(ndim=2, dtype="float32"))) is None
    assert shape_of(relax.Var("x", relax.ShapeType(ndim=2))) is None
