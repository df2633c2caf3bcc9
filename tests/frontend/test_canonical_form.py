"""The check of the canonical form accepts it and nothing near it."""

from __future__ import annotations

import pytest
import tvm
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.canonical_form import check_canonical


def _module(fault: str | None = None) -> tvm.IRModule:
    """One layer of attention in canonical form, but for ``fault``."""
    batch, seq, past = (tvm.tirx.Var(name, "int64") for name in ("batch", "seq", "past"))
    q = relax.Var("q", relax.TensorType((batch, seq, 4, 16), "float32"))
    new = relax.Var("new", relax.TensorType((batch, 2, seq, 16), "float32"))
    pasts = [relax.Var(f"past_{x}_0", relax.TensorType((batch, 2, past, 16), "float32")) for x in "kv"]
    builder = relax.BlockBuilder()
    with builder.function("main", [q, new, *pasts]):
        with builder.dataflow():
            emit = builder.emit
            order = (lambda x: [new, x]) if fault == "past comes last" else (lambda x: [x, new])
            joined = [emit(R.concat(order(x), axis=2)) for x in pasts]
            read = [emit(R.add(joined[0], joined[0])), joined[1]] if fault == "other keys" else joined
            if fault == "keys and values swapped":
                read = read[::-1]
            k, v = (emit(R.permute_dims(x, [0, 2, 1, 3])) for x in read)
            mask = "TopLeft" if fault == "other mask" else "BottomRight"
            out = emit(R.nn.attention(q, k, v, scale=0.25, causal_mask=mask))
            if fault == "two attentions":
                out = emit(R.add(out, emit(R.nn.attention(q, k, v, scale=0.25, causal_mask=mask))))
            presents = [joined[0], pasts[1]] if fault == "past returned" else joined
            result = builder.emit_output(relax.Tuple([out, *presents]))
        builder.emit_func_output(result)
    return builder.get()


def test_the_canonical_form_is_accepted():
    check_canonical(_module(), 1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("past comes last", "layer 0: present_k is not its past joined with new entries"),
        ("past returned", "layer 0: present_v is not its past joined"),
        ("other keys", "layer 0: not exactly one attention"),
        ("keys and values swapped", "layer 0: not exactly one attention"),
        ("other mask", "mask is not causal"),
        ("two attentions", "2 attentions for 1 layers"),
    ],
)
def test_faults_are_named(fault, message):
    with pytest.raises(ModelError, match=message):
        check_canonical(_module(fault), 1)
