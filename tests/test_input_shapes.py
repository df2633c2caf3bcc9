"""Input shapes: their spelling, the batch they fix, and what is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm.errors import UsageError
from rotquant_tvm.input_shapes import fixed_batch, parse_input_shapes


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("ids:[1,-1]", {"ids": [1, -1]}),
        (" ids : [ 12 , -1 ] ", {"ids": [12, -1]}),
        ("ids:[-1,-1]", {"ids": [-1, -1]}),
        ("a:[1] b:[2,3]", {"a": [1], "b": [2, 3]}),
        ("a:[1],b:[]", {"a": [1], "b": []}),
    ],
)
def test_spellings(text, shapes):
    assert parse_input_shapes(text) == shapes


@given(st.dictionaries(st.text("abz_0", min_size=1), st.lists(st.integers(-1, 99)), min_size=1))
def test_what_is_written_is_read(shapes):
    text = " ".join(f"{name}:[{','.join(map(str, sizes))}]" for name, sizes in shapes.items())
    assert parse_input_shapes(text) == shapes


@pytest.mark.parametrize(
    "text", ["", " ", "ids", "ids:1,-1", "ids:[1,-1", "ids:[1;-1]", "ids:[1,,2]", "[1,-1]", "x ids:[1]"]
)
def test_what_cannot_be_read_is_refused_with_the_spelling(text):
    with pytest.raises(UsageError, match=r"cannot read .*ids:\[1,-1\]"):
        parse_input_shapes(text)


def test_an_input_has_one_shape():
    with pytest.raises(UsageError, match="'ids' twice"):
        parse_input_shapes("ids:[1,-1] ids:[2,-1]")


@pytest.mark.parametrize(
    ("shapes", "batch"),
    [(None, None), ({}, None), ({"ids": [-1, -1]}, None), ({"ids": [1, -1]}, 1), ({"ids": (7, -1)}, 7)],
)
def test_the_batch_they_fix(shapes, batch):
    assert fixed_batch(shapes) == batch


@pytest.mark.parametrize(
    ("shapes", "fragment"),
    [
        ({"tokens": [1, -1]}, "no input 'tokens'.*takes ids"),
        ({"ids": [1, -1], "last": [1]}, "no input 'last'"),
        ({"ids": [1]}, "not of rank 1"),
        ({"ids": []}, "not of rank 0"),
        ({"ids": [1, -1, 4]}, "not of rank 3"),
        ({"ids": [1, 128]}, "seq is fixed to 128.*prefill"),
        ({"ids": [0, -1]}, "batch is 0"),
        ({"ids": [-2, -1]}, "batch is -2"),
        ({"ids": [1, 0]}, "seq is 0"),
        ({"ids": [1.5, -1]}, "batch is 1.5"),
        ({"ids": [True, -1]}, "batch is True"),
    ],
)
def test_refusals(shapes, fragment):
    with pytest.raises(UsageError, match=fragment):
        fixed_batch(shapes)
