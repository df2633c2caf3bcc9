"""A decoder of one attention and nothing else: what the passes make of it are the operators of any such attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax import op

from ..errors import UsageError

_IDS = 16
"""Token ids; queries, keys and values are rows of tables, by id."""


@dataclass(frozen=True)
class AttentionHeads:
    """The attention of a model that is not at hand; Llama-3.1-8B's by default. Raises ``UsageError``."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UsageError(f"{self.heads} heads are no multiple of {self.kv_heads} kv heads; queries go in groups")


def bare_model(attention: AttentionHeads) -> tvm.IRModule:
    """The canonical module of a decoder with this attention; its logits are the attention's output."""
    batch, seq, past = (tirx.Var(name, "int64") for name in ("batch", "seq", "past"))
    tensor, dtype, dim = relax.TensorType, attention.dtype, attention.head_dim
    counts = {"q": attention.heads, "k": attention.kv_heads, "v": attention.kv_heads}
    index = [("ids", [batch, seq]), ("positions", [batch, seq]), ("last", [batch])]
    inputs = [relax.Var(name, tensor(shape, "int32")) for name, shape in index]
    pasts = [relax.Var(f"past_{role}_0", tensor([batch, counts[role], past, dim], dtype)) for role in "kv"]
    tables = [relax.Var(f"table_{role}", tensor([_IDS, count * dim], dtype)) for role, count in counts.items()]
    attrs = {"num_input": len(inputs) + len(pasts), "rotquant.inputs": {name: name for name, _ in index}}
    builder = relax.BlockBuilder()
    emit = builder.emit
    with builder.function("main", [*inputs, *pasts, *tables], attrs=attrs):
        with builder.dataflow():

            def heads(table: Any, count: int) -> Any:
                rows = emit(op.take(table, inputs[0], axis=0, mode="clip"))
                return emit(op.reshape(rows, [batch, seq, count, dim]))

            query, *new = (heads(table, count) for table, count in zip(tables, counts.values(), strict=True))
            new = [emit(op.permute_dims(x, [0, 2, 1, 3])) for x in new]
            presents = [emit(op.concat(pair, axis=2)) for pair in zip(pasts, new, strict=True)]
            keys, values = (emit(op.permute_dims(x, [0, 2, 1, 3])) for x in presents)
            output = emit(op.nn.attention(query, keys, values, scale=dim**-0.5, causal_mask="BottomRight"))
            size = attention.heads * dim
            flat = emit(op.reshape(output, [batch, seq, size]))
            last = op.broadcast_to(emit(op.reshape(inputs[2], [batch, 1, 1])), [batch, 1, size])
            chosen = emit(op.gather_elements(flat, emit(op.astype(emit(last), "int64")), axis=1))
            logits = emit(op.reshape(chosen, [batch, size]))
            result = builder.emit_output(relax.Tuple([logits, *presents]))
        builder.emit_func_output(result)
    return builder.finalize()
