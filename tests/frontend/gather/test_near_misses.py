"""What is attention and cannot be gathered is named with the operator in the way; what is none is left alone."""

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.gather import gather_attention, near_misses

from .gathered_case import function_of, gathered
from .spellings import DIM, HEADS, KV_HEADS, B, P, S, attend, const, qkv

WIDTH = HEADS * DIM
X = {"x": (B, S, WIDTH), "w": (WIDTH, WIDTH)}
FULL = (B, HEADS, S, P)


def plain(emit, q, k, v, **changes):
    return attend(emit, q, k, v, **changes)


def scores_of(emit, q, k):
    return emit(R.matmul(q, emit(R.permute_dims(k, [0, 1, 3, 2]))))


def returned_weights(emit, q, k, v):
    weights = emit(R.nn.softmax(scores_of(emit, q, k), -1))
    return relax.Tuple([emit(R.matmul(weights, v)), weights])


def read_scores(emit, q, k, v):
    scores = scores_of(emit, q, k)
    out = emit(R.matmul(emit(R.nn.softmax(scores, -1)), v))
    return relax.Tuple([out, emit(R.max(scores, [-1]))])


def dropped(emit, q, k, v):
    def drop(weights, _):
        return emit(relax.TupleGetItem(emit(R.nn.dropout(weights, 0.1)), 0))

    return plain(emit, q, k, v, after=drop)


def with_sinks(emit, q, k, v, sinks):
    """A column of logits that no key has, dropped after the softmax."""
    column = emit(R.broadcast_to(emit(R.reshape(sinks, [1, HEADS, 1, 1])), [B, HEADS, S, 1]))
    joined = emit(R.concat([scores_of(emit, q, k), column], axis=-1))
    weights = emit(R.nn.softmax(emit(R.subtract(joined, emit(R.max(joined, [-1], keepdims=True)))), -1))
    kept = emit(R.strided_slice(weights, [3], [0], [P], [1]))
    return R.matmul(emit(relax.op.reshape(kept, [B, HEADS, S, P])), v)


def alibi(emit, q, k, v, slopes):
    distance = emit(R.astype(emit(R.arange(0, P, 1, "int64")), "float32"))
    bias = emit(R.multiply(emit(R.reshape(slopes, [1, HEADS, 1, 1])), distance))
    return plain(emit, q, k, v, before=lambda s: emit(R.add(s, bias)))


def two_products(emit, q, k, v, r):
    return plain(emit, q, k, v, before=lambda s: emit(R.add(s, scores_of(emit, q, r))))


def masked_then_capped(emit, q, k, v, m):
    return plain(emit, q, k, v, before=lambda s: emit(R.tanh(emit(R.add(s, m)))))


def guarded_otherwise(emit, q, k, v, m):
    return plain(emit, q, k, v, after=lambda w, s: emit(R.where(m, const(0.0), w)))


def different_heads(emit, q, k, v):
    return plain(emit, q, emit(R.repeat(k, HEADS // KV_HEADS, 1)), v)


def before(change):
    return lambda emit, q, k, v, *m: plain(emit, q, k, v, before=lambda s: emit(change(emit, s, *m)))


def after(change):
    return lambda emit, q, k, v, *m: plain(emit, q, k, v, after=lambda w, s: emit(change(emit, w, *m)))


CASES = {
    "returned weights": (qkv(), returned_weights, "Tuple", "another reader"),
    "read scores": (qkv(), read_scores, "relax.max", "another reader"),
    "dropout": (qkv(), dropped, "relax.nn.dropout", "probability 0.1"),
    "sinks": (qkv(sinks=(HEADS,)), with_sinks, "relax.strided_slice", "attention sinks"),
    "alibi": (qkv(slopes=(HEADS,)), alibi, "relax.multiply", "differs by head (alibi"),
    "bias per head": (qkv(m=FULL), before(lambda e, s, m: R.add(s, m)), "a parameter", "differs by head"),
    "head mask": (qkv(m=(1, HEADS, 1, 1)), after(lambda e, w, m: R.multiply(w, m)), "relax.multiply", "multiplied"),
    "temperature": (qkv(m=(1,)), before(lambda e, s, m: R.multiply(s, m)), "relax.multiply", "no constant"),
    "divisor": (qkv(m=(1,)), before(lambda e, s, m: R.divide(s, m)), "relax.divide", "no constant"),
    "two products": (qkv(r=(B, HEADS, P, DIM)), two_products, "relax.add", "sum of two products"),
    "masked then capped": (qkv(m=(S, P)), masked_then_capped, "relax.add", "before they are capped"),
    "weak mask": (
        qkv(m=((S, P), "bool")),
        before(lambda e, s, m: R.where(m, s, const(-1.0))),
        "relax.where",
        "-1, which does not hide",
    ),
    "mask of tensors": (
        qkv(m=((S, P), "bool"), n=(S, P)),
        before(lambda e, s, m, n: R.where(m, s, n)),
        "relax.where",
        "no constant",
    ),
    "bounded above": (qkv(), before(lambda e, s: R.clip(s, -1e9, 5.0)), "relax.clip", "at most 5"),
    "bounded below": (qkv(), before(lambda e, s: R.maximum(s, const(0.0))), "relax.maximum", "lower bound 0"),
    "other guard": (qkv(m=((S, P), "bool")), guarded_otherwise, "relax.where", "other rows"),
    "different heads": (
        qkv(HEADS) | {"k": (B, KV_HEADS, P, DIM)},
        different_heads,
        "relax.matmul",
        "do not have the same heads",
    ),
    "one memory": (
        qkv() | {"k": (1, HEADS, P, DIM), "v": (1, HEADS, P, DIM)},
        plain,
        "relax.matmul",
        "shared by the rows of a batch",
    ),
    "sparse": (qkv(), before(lambda e, s: R.nn.relu(s)), "relax.nn.relu", "a relu"),
    "integers": (
        qkv(),
        before(lambda e, s: R.astype(e(R.astype(s, "int32")), "float32")),
        "relax.astype",
        "integers",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_names_what_is_in_the_way(name):
    arguments, body, operator, reason = CASES[name]
    mod = function_of(arguments, body)
    assert gather_attention(mod) is mod
    (miss,) = near_misses(mod)
    assert miss.operator == operator
    assert reason in miss.reason and "\n" not in miss.reason
    values = relax.analysis.get_var2val(mod["main"])
    assert [var for var in values if var.name == miss.variable.name and values[var].op.name == "relax.nn.softmax"]


def projected(emit, x, w, weights):
    """Attention of computed queries, keys and values whose weights are made of scores by ``weights``."""
    q, k, v = (
        emit(R.permute_dims(emit(R.reshape(emit(R.matmul(x, w)), [B, S, HEADS, DIM])), [0, 2, 1, 3])) for _ in range(3)
    )
    return R.matmul(weights(scores_of(emit, q, k)), v)


def linear_attention(emit, x, w):
    q, k, v = (emit(R.reshape(emit(R.matmul(x, w)), [B, S, HEADS, DIM])) for _ in range(3))
    memory = emit(R.einsum((emit(R.exp(k)), v), "bshd,bshe->bhde"))
    return R.einsum((q, memory), "bshd,bhde->bshe")


NO_SOFTMAX = {
    "relu": (lambda e, x, w: projected(e, x, w, lambda s: e(R.nn.relu(s))), "relax.nn.relu", "a relu"),
    "sigmoid": (
        lambda e, x, w: projected(e, x, w, lambda s: e(R.sigmoid(e(R.multiply(s, const(0.3)))))),
        "relax.sigmoid",
        "a sigmoid",
    ),
    "linear": (linear_attention, "relax.einsum", "linear attention"),
    "plain products": (lambda e, x, w: projected(e, x, w, lambda s: s), "relax.matmul", "linear attention"),
}


@pytest.mark.parametrize("name", NO_SOFTMAX)
def test_attention_without_a_softmax(name):
    body, operator, reason = NO_SOFTMAX[name]
    mod = function_of(X, body)
    assert gather_attention(mod) is mod
    (miss,) = near_misses(mod)
    assert miss.operator == operator and reason in miss.reason


def mlp(emit, x, w):
    return R.matmul(emit(R.nn.relu(emit(R.matmul(x, w)))), w)


def router(emit, x, w):
    """A mixture of experts: softmax of a linear layer, the best two of it, experts' results weighted by them."""
    chances = emit(R.nn.softmax(emit(R.matmul(x, w)), -1))
    best = emit(R.topk(chances, 2, -1, "values", False, "int64"))
    return R.matmul(emit(R.multiply(x, emit(R.sum(best, [-1], keepdims=True)))), w)


def gate(emit, x, w):
    """A softmax as a gate, between linear layers."""
    return R.matmul(emit(R.multiply(emit(R.nn.softmax(emit(R.matmul(x, w)), -1)), x)), w)


def soft_lookup(emit, x, w):
    """A softmax over the rows of a table: two linear layers."""
    return R.matmul(emit(R.nn.softmax(emit(R.matmul(x, emit(R.permute_dims(w)))), -1)), w)


def experts(emit, x, w):
    """Products of a batch of experts' inputs with their weights."""
    rows = emit(R.reshape(emit(R.matmul(x, w)), [HEADS, B * S, DIM]))
    stacked = [const(np.ones((HEADS, DIM, DIM))) for _ in range(2)]
    return R.matmul(emit(R.nn.relu(emit(R.matmul(rows, stacked[0])))), stacked[1])


def chosen_experts(emit, x, w):
    """Experts whose weights are looked up for each token, by a computed choice."""
    rows = emit(R.matmul(x, w))
    best = emit(R.reshape(emit(R.topk(rows, 1, -1, "indices", False, "int64")), [B * S]))
    up, down = (emit(R.take(const(np.ones((WIDTH, DIM, DIM))), best, axis=0, mode="clip")) for _ in range(2))
    heads = emit(R.reshape(rows, [B * S, HEADS, DIM]))
    inner = emit(R.matmul(heads, up))
    return R.matmul(emit(R.multiply(inner, emit(R.sigmoid(inner)))), down)


def sampling(emit, x, w):
    return R.cumsum(emit(R.nn.softmax(emit(R.matmul(x, w)), -1)), axis=-1)


@pytest.mark.parametrize("body", [mlp, router, gate, soft_lookup, experts, chosen_experts, sampling])
def test_other_products_and_softmaxes_are_left_alone(body):
    mod = function_of(X, body)
    assert gather_attention(mod) is mod
    assert near_misses(mod) == []


def test_gathers_what_it_can_and_names_the_rest():
    def body(emit, q, k, v):
        first = emit(plain(emit, q, k, v))
        second = emit(plain(emit, q, k, v, before=lambda s: emit(R.nn.relu(s))))
        return R.add(first, second)

    mod = function_of(qkv(), body)
    result, found = gathered(mod)
    assert len(found) == 1
    assert [miss.operator for miss in near_misses(result)] == ["relax.nn.relu"]
    assert gather_attention(result) is result


def test_dead_readers_do_not_count():
    def body(emit, q, k, v):
        scores = scores_of(emit, q, k)
        emit(R.max(scores, [-1]))
        return R.matmul(emit(R.nn.softmax(scores, -1)), v)

    assert len(gathered(function_of(qkv(), body))[1]) == 1


def test_keeps_soft_caps_of_attention_that_is_there():
    def body(emit, q, k, v):
        swapped = [emit(R.permute_dims(x, [0, 2, 1, 3])) for x in (q, k, v)]
        whole = emit(R.permute_dims(emit(R.nn.attention(*swapped, scale=0.5)), [0, 2, 1, 3]))
        return plain(emit, whole, k, v, before=lambda s: emit(R.multiply(emit(R.tanh(s)), const(3.0))))

    mod = function_of(qkv(), body)
    mod["main"] = mod["main"].with_attr("rotquant.softcaps", [7.0])
    assert [attention.softcap for attention in gathered(mod)[1]] == [7.0, 3.0]


def test_other_functions_and_attributes_stay():
    mod = function_of(qkv(), plain)
    other = relax.utils.copy_with_new_vars(function_of(X, mlp)["main"]).with_attr("global_symbol", "other")
    mod = tvm.IRModule({**mod.functions, tvm.ir.GlobalVar("other"): other}).with_attr("note", "kept")
    mod["main"] = mod["main"].with_attr("num_input", 3)
    result = gather_attention(mod)
    assert result.attrs["note"] == "kept"
    assert result["main"].attrs["num_input"] == 3
    tvm.ir.assert_structural_equal(result["other"], other)


def test_unknown_shapes_are_named():
    def body(emit, q, k, v):
        return R.matmul(emit(R.nn.softmax(emit(R.matmul(q, k)), -1)), v)

    unknown = [relax.Var(name, relax.TensorType(ndim=4, dtype="float32")) for name in "qkv"]
    builder = relax.BlockBuilder()
    with builder.function("main", unknown):
        with builder.dataflow():
            result = builder.emit_output(body(builder.emit, *unknown))
        builder.emit_func_output(result)
    (miss,) = near_misses(builder.get())
    assert miss.operator == "relax.matmul" and "unknown" in miss.reason
