"""What a session must know of a module's GPU kernels: whether a step can be recorded, and how large a batch may be."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx
from tvm_ffi import structural_walk

from .codegen import COUNTERS_ATTR
from .ops.site_shape import SiteShape

QUERY_BLOCK = 8
"""Query heads of one kv head that a stream of decode attention serves."""


def session_limits(mod: tvm.IRModule, target: tvm.target.Target) -> dict[str, Any]:
    """Entries for ``kv_cache_info``: on CUDA ``recordable`` and, if there is one, ``max_batch``.

    ``recordable``: no kernel takes global memory for itself. Such memory comes from a pool that may move it, and a
    recorded graph would go on using the old place. ``max_batch``: every stream of a sequence has one of a kernel's
    counters.
    """
    if target.kind.name != "cuda" or not any(isinstance(func, relax.Function) for func in mod.functions.values()):
        return {}
    kernels = [func for func in mod.functions.values() if isinstance(func, tirx.PrimFunc)]
    limits: dict[str, Any] = {"recordable": not any(map(_takes_memory, kernels))}
    batches = [batch for batch in map(_max_batch, kernels) if batch is not None]
    return limits | ({"max_batch": min(batches)} if batches else {})


def _takes_memory(func: tirx.PrimFunc) -> bool:
    """Whether a kernel allocates global memory."""
    found: list[bool] = []
    structural_walk(func.body, (tirx.AllocBuffer, lambda statement: found.append(_is_global(statement.buffer))))
    note = lambda block: found.extend(map(_is_global, block.alloc_buffers))  # noqa: E731
    structural_walk(func.body, (tvm.s_tir.SBlock, note))
    return any(found)


def _is_global(buffer: Any) -> bool:
    return str(buffer.scope()) in ("", "global")


def _max_batch(func: tirx.PrimFunc) -> int | None:
    counters, site = (func.attrs or {}).get(COUNTERS_ATTR), SiteShape.of(func)
    if counters is None or site is None:
        return None
    return int(counters) // (site.kv_heads * -(-site.group // QUERY_BLOCK))
