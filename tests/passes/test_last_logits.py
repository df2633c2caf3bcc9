"""A step with logits after every token becomes one with those after the last."""

from __future__ import annotations

import pytest
import tvm
from rotquant_tvm.passes.last_logits import returns_every_logit, with_last_logits
from rotquant_tvm.passes.quantize_kv_cache import QuantizeKVCache, read_cache_info
from tvm import relax
from tvm.relax import op

from rotquant_tvm.errors import ModelError
from rotquant_tvm.kv_cache_config import KVCacheConfig

from .tiny_model import HIDDEN, VOCAB, TinyModel

CONFIG = KVCacheConfig.parse("iso3")


class EveryLogit(TinyModel):
    """Soft-capped logits [batch, seq, vocab]."""

    def logits(self, bb, x, positions, last, weight):
        product = bb.emit(op.matmul(x, weight))
        return bb.emit(op.multiply(bb.emit(op.tanh(product)), relax.const(3.0, "float32")))


class Mixed(TinyModel):
    """Logits that depend on the tokens before."""

    def logits(self, bb, x, positions, last, weight):
        return bb.emit(op.cumsum(bb.emit(op.matmul(x, weight)), axis=1))


class Positioned(TinyModel):
    """An output layer whose weights follow from the call's positions."""

    def logits(self, bb, x, positions, last, weight):
        factor = bb.emit(op.astype(bb.emit(op.max(positions)), "float32"))
        return bb.emit(op.matmul(x, bb.emit(op.multiply(weight, factor))))


def products(func, width):
    """Shapes of what is multiplied with the output layer's weights."""
    values = [binding.value for block in func.body.blocks for binding in block.bindings]
    calls = [value for value in values if getattr(getattr(value, "op", None), "name", "") == "relax.matmul"]
    return [sizes(call.args[0].ty) for call in calls if call.ty.shape[-1] == width]


def sizes(kind):
    """A shape as numbers and names."""
    return [int(size) if isinstance(size, tvm.tirx.IntImm) else str(size) for size in kind.shape]


def pruned(func):
    return relax.transform.DeadCodeElimination(["main"])(tvm.IRModule({"main": func}))["main"]


@pytest.mark.parametrize(("model", "rows"), [(EveryLogit(), 1), (Mixed(), "seq"), (Positioned(), "seq")])
def test_the_token_is_chosen_before_the_output_layer_where_that_is_the_same(model, rows):
    main = model.module()["main"]
    assert returns_every_logit(main)
    last = pruned(with_last_logits(main))
    assert products(last, VOCAB) == [["batch", rows, HIDDEN]]
    assert sizes(last.ret_ty.fields[0]) == ["batch", VOCAB]
    assert [param.name for param in last.params] == [param.name for param in main.params]


def test_the_library_has_a_third_function():
    mod = QuantizeKVCache(CONFIG, every_logit=True)(EveryLogit().module())
    shapes = {name: sizes(mod[name].ret_ty) for name in ("prefill", "decode", "verify")}
    last = ["batch", VOCAB]
    assert shapes == {"prefill": last, "decode": last, "verify": ["batch", "seq", VOCAB]}
    assert read_cache_info(mod)["every_logit"]
    ordinary = QuantizeKVCache(CONFIG)(TinyModel().module())
    assert "every_logit" not in read_cache_info(ordinary)
    assert "verify" not in {gvar.name_hint for gvar in ordinary.get_global_vars()}


def test_a_step_with_the_last_logits_alone_is_refused():
    with pytest.raises(ModelError, match="every_logit=True"):
        QuantizeKVCache(CONFIG, every_logit=True)(TinyModel().module())
