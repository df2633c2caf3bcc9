"""What the kernels of one attention site are specialized on; every such kernel carries it as an attribute."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import tvm

from ..cache_policy import CachePolicy
from ..formats import Codec, KVFormat

SITE_ATTR = "rotquant.site"
OP_ATTR = "rotquant.op"


@dataclass(frozen=True)
class SiteShape:
    """Everything but the tensors: K and V format names, heads, head dimension, softmax scale, window, dtype.

    ``chunk`` tells prefill (several new tokens, whose keys and values are at hand unquantized) from decode; ``splits``
    is how many parts a sequence is read in by decode attention; ``policy`` is the cache policy's name. ``rotated``: the
    kernel itself rotates the queries and un-rotates the output, by coefficients that it takes after the lengths (a
    chunk's kernel by matrices, and only for what it reads of the past).
    ``softcap`` bounds the scaled scores (``ops.soft_cap``; None: they are as they are).
    """

    k: str
    v: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    dtype: str
    chunk: bool = False
    splits: int = 1
    policy: str = ""
    rotated: bool = False
    softcap: float | None = None

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def wraps(self) -> bool:
        """Whether the tiles are a ring (``window_ring``): they are where there is a window."""
        return bool(self.window)

    @property
    def cache_policy(self) -> CachePolicy:
        """The policy that ``policy`` spells."""
        return CachePolicy.parse(self.policy)

    def codecs(self) -> tuple[Codec, Codec]:
        """Codecs of this shape; their rotations have the right structure but are not the site's."""
        k, v = KVFormat.parse(self.k), KVFormat.parse(self.v)
        return k.codec(self.head_dim), v.codec(self.head_dim)

    def attach(self, func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
        """The function, carrying this shape."""
        return func.with_attr(SITE_ATTR, json.dumps(asdict(self)))

    @staticmethod
    def of(func: tvm.tirx.PrimFunc) -> SiteShape | None:
        """The shape that a function carries, if any."""
        text = func.attrs.get(SITE_ATTR) if func.attrs is not None else None
        return None if text is None else SiteShape(**json.loads(str(text)))
