"""Spellings drawn at random: where the scale is, how masks, repeated heads, layouts and casts are written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm.relax import op as R

from rotquant_tvm.frontend.gather import near_misses

from .gathered_case import causal, function_of, gathered, run_both
from .numpy_runner import run_in_numpy
from .spellings import LOW, B, P, S, const


@dataclass(frozen=True)
class Drawn:
    """One spelling: how each part of attention is written."""

    kv_heads: int
    group: int
    dim: int
    sizes: tuple[int, int, int]
    symbolic: bool
    layout: str
    repeat: str
    scales: tuple[tuple[str, str, float], ...]
    mask: str
    cap: float
    cast: bool
    guard: bool

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def scale(self) -> float:
        return math.prod(value if how == "multiply" else 1 / value for _, how, value in self.scales)


@st.composite
def spellings(draw: Any) -> Drawn:
    places, operations = st.sampled_from(["q", "k", "kt", "scores"]), st.sampled_from(["multiply", "divide"])
    place = st.tuples(places, operations, st.sampled_from([0.5, 3.0]))
    seq = draw(st.integers(1, 4))
    return Drawn(
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 3])),
        dim=draw(st.sampled_from([2, 8])),
        sizes=(draw(st.integers(1, 3)), seq, max(2, seq + draw(st.integers(0, 3)))),
        symbolic=draw(st.booleans()),
        layout=draw(st.sampled_from(["bhsd", "merged", "bshd", "sbhd", "flat", "einsum", "transposed"])),
        repeat=draw(st.sampled_from(["expand", "repeat", "tile", "take", "concat"])),
        scales=tuple(draw(st.lists(place, max_size=3, unique_by=lambda one: one[0]))),
        mask=draw(st.sampled_from(["none", "added", "subtracted", "where", "filled", "ones", "per head", "two"])),
        cap=draw(st.sampled_from([0.0, 2.0])),
        cast=draw(st.booleans()),
        guard=draw(st.booleans()),
    )


class Writer:
    """Emits the spelling that was drawn."""

    def __init__(self, drawn: Drawn, emit: Any, sizes: tuple) -> None:
        self.drawn, self.emit, (self.b, self.s, self.p) = drawn, emit, sizes

    def attention(self, q: Any, k: Any, v: Any, m: Any) -> Any:
        q, k, v = self.to_bhsd(q, self.s), self.repeat(self.to_bhsd(k, self.p)), self.repeat(self.to_bhsd(v, self.p))
        if self.drawn.layout == "einsum":
            product = R.einsum((self.scaled("q", q), self.scaled("k", k)), "bhqd,bhkd->bhqk")
        elif self.drawn.layout == "transposed":  # scores [keys, queries]
            product = R.matmul(self.scaled("k", k), self.turned(self.scaled("q", q)))
        else:
            turned = self.turned(self.merged(self.scaled("k", k)))
            product = R.matmul(self.merged(self.scaled("q", q)), self.scaled("kt", turned))
        weights = self.weights(self.scores(self.split(self.emit(product)), m))
        if self.drawn.layout == "einsum":
            return R.einsum((weights, v), "bhqk,bhkd->bqhd")
        if self.drawn.layout == "transposed":
            return R.matmul(self.turned(v), weights)
        return self.from_bhsd(self.split(self.emit(R.matmul(self.merged(weights), self.merged(v)))))

    def scaled(self, place: str, x: Any) -> Any:
        for where, how, value in self.drawn.scales:
            # Only some layouts have a transposed copy of the keys to scale.
            if where == place or (place == "k" and where == "kt" and self.drawn.layout in ("einsum", "transposed")):
                x = self.emit(getattr(R, how)(x, const(value)))
        return x

    def to_bhsd(self, x: Any, length: Any) -> Any:
        layout, dim = self.drawn.layout, self.drawn.dim
        if layout == "flat":
            x = self.emit(R.reshape(x, [self.b, length, x.ty.shape[2] // dim, dim]))
        order = {"bshd": [0, 2, 1, 3], "flat": [0, 2, 1, 3], "sbhd": [1, 2, 0, 3]}.get(layout)
        return x if order is None else self.emit(R.permute_dims(x, order))

    def from_bhsd(self, x: Any) -> Any:
        order = {"bshd": [0, 2, 1, 3], "flat": [0, 2, 1, 3], "sbhd": [2, 0, 1, 3]}.get(self.drawn.layout)
        return x if order is None else R.permute_dims(x, order)

    def repeat(self, x: Any) -> Any:
        drawn, emit = self.drawn, self.emit
        if drawn.group == 1:
            return x
        if drawn.repeat == "expand":
            wide = [self.b, drawn.kv_heads, drawn.group, self.p, drawn.dim]
            x = emit(R.broadcast_to(emit(R.expand_dims(x, [2])), wide))
            return emit(R.reshape(x, [self.b, drawn.heads, self.p, drawn.dim]))
        if drawn.repeat == "take":
            index = np.repeat(np.arange(drawn.kv_heads), drawn.group)
            return emit(R.take(x, const(index, "int64"), axis=1, mode="clip"))
        if drawn.repeat == "tile":
            return emit(R.tile(x, [1, drawn.group, 1, 1]))
        if drawn.repeat == "concat":
            return emit(R.concat([x] * drawn.group, axis=1))
        return emit(R.repeat(x, drawn.group, 1))

    def merged(self, x: Any) -> Any:
        if self.drawn.layout not in ("merged", "sbhd"):
            return x
        return self.emit(R.reshape(x, [self.b * self.drawn.heads, x.ty.shape[2], x.ty.shape[3]]))

    def split(self, x: Any) -> Any:
        if self.drawn.layout not in ("merged", "sbhd"):
            return x
        return self.emit(R.reshape(x, [self.b, self.drawn.heads, x.ty.shape[1], x.ty.shape[2]]))

    def turned(self, x: Any) -> Any:
        rank = x.ty.ndim
        return self.emit(R.permute_dims(x, [*range(rank - 2), rank - 1, rank - 2]))

    def scores(self, scores: Any, m: Any) -> Any:
        drawn, emit = self.drawn, self.emit
        scores = self.scaled("scores", scores)
        if drawn.cap:
            scores = emit(R.multiply(emit(R.tanh(emit(R.divide(scores, const(drawn.cap))))), const(drawn.cap)))
        if drawn.mask == "none":
            return scores
        m = self.turned(m) if drawn.layout == "transposed" else m
        low = const(-math.inf if drawn.guard else LOW)
        if drawn.mask in ("added", "subtracted"):
            hidden = emit(R.where(m, const(0.0), low if drawn.mask == "added" else const(-LOW)))
            return emit((R.add if drawn.mask == "added" else R.subtract)(scores, hidden))
        if drawn.mask == "where":
            return emit(R.where(m, scores, low))
        if drawn.mask == "filled":
            return emit(R.where(emit(R.logical_not(m)), const(-1e9), scores))
        if drawn.mask == "ones":
            ones = emit(R.subtract(const(1.0), emit(R.astype(m, "float32"))))
            return emit(R.add(scores, emit(R.multiply(ones, const(LOW)))))
        if drawn.mask == "per head":
            shape = [self.b, drawn.heads, *list(m.ty.shape)[2:]]
            return emit(R.where(emit(R.broadcast_to(m, shape)), scores, const(LOW)))
        return emit(R.add(emit(R.where(m, scores, const(-1e9))), emit(R.where(m, const(0.0), low))))

    def weights(self, scores: Any) -> Any:
        drawn, emit = self.drawn, self.emit
        axis = 2 if drawn.layout == "transposed" else 3
        weights = emit(R.nn.softmax(emit(R.astype(scores, "float64")) if drawn.cast else scores, axis))
        if drawn.cast:
            weights = emit(R.astype(weights, "float32"))
        if drawn.guard:
            seen = emit(R.astype(emit(R.not_equal(scores, const(-math.inf))), "int8"))
            empty = emit(R.logical_not(emit(R.astype(emit(R.max(seen, [axis], keepdims=True)), "bool"))))
            weights = emit(R.where(empty, emit(R.zeros_like(weights)), weights))
        return weights


def module(drawn: Drawn):
    sizes = (B, S, P) if drawn.symbolic else drawn.sizes
    b, s, p = sizes

    def shape(heads, length):
        if drawn.layout == "flat":
            return b, length, heads * drawn.dim
        return {"bshd": (b, length, heads, drawn.dim), "sbhd": (length, b, heads, drawn.dim)}.get(
            drawn.layout, (b, heads, length, drawn.dim)
        )

    arguments = {"q": shape(drawn.heads, s), "k": shape(drawn.kv_heads, p), "v": shape(drawn.kv_heads, p)}
    arguments["m"] = (b, 1, s, p), "bool"
    return function_of(arguments, lambda emit, *x: Writer(drawn, emit, sizes).attention(*x))


def arrays(drawn: Drawn) -> list[np.ndarray]:
    """Inputs; with a guard, one query sees no key."""
    generator = np.random.default_rng(1)
    batch, seq, length = drawn.sizes
    visible = np.broadcast_to(causal(seq, length) == 0, (batch, 1, seq, length)).copy()
    if drawn.guard and drawn.mask in ("added", "where"):
        visible[-1, :, 0] = False
    sizes = {"b": batch, "s": seq, "p": length}
    shapes = [parameter.ty.shape.values for parameter in module(drawn)["main"].params[:3]]
    concrete = [[sizes.get(getattr(size, "name", ""), size) for size in shape] for shape in shapes]
    tensors = [generator.standard_normal([int(size) for size in shape]).astype("float32") for shape in concrete]
    return [*tensors, visible]


def check(drawn: Drawn) -> tuple:
    before = module(drawn)
    after, found = gathered(before)
    assert near_misses(before) == []
    assert len(found) == 1
    if drawn.symbolic or min(drawn.sizes) > 1:
        assert (found[0].heads, found[0].kv_heads) == (drawn.heads, drawn.kv_heads)
    assert found[0].scale == pytest.approx(drawn.scale, rel=1e-5)
    assert found[0].softcap == drawn.cap
    assert found[0].masked == (drawn.mask != "none")
    inputs = arrays(drawn)
    (expected,), (actual,) = run_in_numpy(before["main"], inputs), run_in_numpy(after["main"], inputs, [drawn.cap])
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    return before, after, inputs


BRIEF = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@BRIEF
@given(spellings())
def test_any_spelling_is_gathered(drawn):
    check(drawn)


@pytest.mark.full
@settings(BRIEF, max_examples=600)
@given(spellings())
def test_many_spellings_are_gathered(drawn):
    check(drawn)


@pytest.mark.full
@settings(BRIEF, max_examples=4)
@given(st.lists(spellings(), min_size=6, max_size=6))
def test_compiled_spellings_are_the_same(several):
    cases = {f"case_{number}": check(replace(drawn, cast=False)) for number, drawn in enumerate(several)}
    for before, after in run_both(cases).values():
        np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-5)


def test_drawn_kv_heads_are_kept():
    drawn = Drawn(2, 3, 8, (2, 3, 5), True, "bhsd", "expand", (), "where", 0.0, False, False)
    for repeat in ("expand", "repeat", "tile", "take", "concat"):
        found = gathered(module(replace(drawn, repeat=repeat)))[1]
        assert (found[0].heads, found[0].kv_heads, found[0].head_dim) == (6, 2, 8)
