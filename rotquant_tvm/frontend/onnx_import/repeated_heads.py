"""Keys and values whose heads a graph repeats for grouped queries, before they are repeated."""

from __future__ import annotations

from tvm import relax

from rotquant_tvm.frontend.onnx_import.known_value import shape_of
from rotquant_tvm.frontend.onnx_import.registry import OnnxNode


def unrepeated(node: OnnxNode, x: relax.Expr) -> relax.Expr:
    """The [batch, kv_heads, length, head_dim] of which x [batch, heads, length, head_dim] repeats each head, or x.

    The form is that of transformers: an axis behind the heads is added, broadcast and joined with them. Attention
    groups its queries by itself.
    """
    wide = _operand(node, x, "relax.reshape")
    narrow = _operand(node, wide, "relax.broadcast_to")
    if wide is None or narrow is None:
        return x
    joined, split, one = shape_of(x), shape_of(wide), shape_of(narrow)
    if joined is None or split is None or one is None or not len(joined) + 1 == len(split) == len(one) == 5:
        return x
    same = node.state.equal
    batch, heads, repeats, length, head_dim = split
    fits = isinstance(heads, int) and isinstance(repeats, int) and same(joined[1], heads * repeats) and one[2] == 1
    pairs = [(joined[0], batch), (joined[2], length), (joined[3], head_dim)]
    pairs += [(one[axis], split[axis]) for axis in (0, 1, 3, 4)]
    if not fits or not all(same(a, b) for a, b in pairs):
        return x
    for name in ("relax.expand_dims", "relax.reshape"):
        source = _operand(node, narrow, name)
        sizes = None if source is None else shape_of(source)
        wanted = [batch, heads, length, head_dim]
        if sizes is not None and len(sizes) == 4 and all(same(a, b) for a, b in zip(sizes, wanted, strict=True)):
            return source
    return x


def _operand(node: OnnxNode, value: relax.Expr | None, name: str) -> relax.Expr | None:
    """The first operand of the call that a variable is bound to, if it is of this operator."""
    bound = node.state.builder.lookup_binding(value) if isinstance(value, relax.Var) else None
    if not isinstance(bound, relax.Call) or getattr(bound.op, "name", "") != name:
        return None
    return bound.args[0]
