"""Shape buckets: the sizes at which a kernel with symbolic shapes is measured, and which of them is near to what.

A bucket gives every symbolic size of a definition a number, by the size's name: ``{"batch": 8, "tiles": 1024}``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.sym import Analyzer

from ..benchmark.settings import BatchShape, count
from ..cache_policy import CachePolicy
from ..formats import TOKENS
from .kernel_shape import KernelShape

Bucket = dict[str, int]

_CACHES = ("append", "append_plain", "flush")
_SEQUENCES = {
    ("attention_decode", "cuda"): ("1x1K", "1x8K", "1x32K", "8x32K", "32x8K", "64x2K"),
    ("attention_decode", "llvm"): ("1x1K", "1x4K"),
    ("attention_prefill", "cuda"): ("1x4K",),
    ("attention_prefill", "llvm"): ("1x512",),
}
"""Sequences x tokens that they have: contexts of decode attention, prompts of prefill attention."""
_NEW_TOKENS = {"cuda": ("1x1", "1x4K"), "llvm": ("1x1", "1x512")}
"""Sequences x new tokens, where operators append or rotate them."""
_MODEL = ("linear", "rms_norm", "loops")
_ROWS = {"cuda": ("1x1", "1x4K"), "llvm": ("1x1", "1x512")}
"""Sequences x tokens of what else a model does: a decode step and a prompt."""
_VOCABULARY = 16
"""Times as many outputs as inputs, from which on a layer is taken for a model's last one."""
_VECTORS = {"cuda": (8192, 1 << 20), "llvm": (8192,)}
"""Vectors of operators on plain ones."""


@dataclass(frozen=True)
class WantedSizes:
    """What a compile knows of the shapes that its kernels will see; None is anything.

    ``others``: they will see other sizes too, as a model's do, where ``tokens`` is what a session has by default.
    """

    batch: int | None = None
    tokens: int | None = None
    others: bool = False

    def sizes(self) -> Bucket:
        """As far as they are known. An open batch counts as 1, and appends as those of a decode step."""
        tokens = {} if self.tokens is None else {"tiles": max(1, -(-self.tokens // TOKENS))}
        batch = self.batch or 1
        return {"batch": batch, "seq": 1, "n0": batch, "n1": 1, "d0": batch, "d1": 1} | tokens


def size_names(func: tirx.PrimFunc) -> tuple[str, ...]:
    """The symbolic sizes of a definition's parameters, in order of appearance."""
    names: dict[str, None] = {}
    for param in func.params:
        for size in getattr(param, "shape", ()):
            if isinstance(size, tirx.Var):
                names.setdefault(size.name)
    return tuple(names)


def shapes_in(func: tirx.PrimFunc, bucket: Mapping[str, int]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every parameter at the sizes of a bucket."""
    analyzer = Analyzer()
    for size in {size for param in func.params for size in param.shape if isinstance(size, tirx.Var)}:
        analyzer.bind(size, tirx.const(bucket[size.name], size.ty.dtype))
    return [(p.name, str(p.dtype), tuple(int(analyzer.simplify(size)) for size in p.shape)) for p in func.params]


def default_buckets(
    shape: KernelShape, names: Sequence[str], kind: str, sequences: Sequence[BatchShape] = ()
) -> list[Bucket]:
    """The buckets that matter most for a definition with the sizes ``names`` on a kind of target.

    ``sequences`` replace those of attention; appends are then measured for their batches. Empty where nothing is known
    of the sizes.
    """
    operator = shape.operator
    policy = CachePolicy.parse(str(shape.properties.get("policy", "")))
    known = {"batch", "seq", "tiles", "blocks"}
    if operator in _MODEL:
        return _model_buckets(shape, names, kind, sequences)
    if (operator, kind) in _SEQUENCES and set(names) <= known:
        chosen = sequences or _parsed(_SEQUENCES[operator, kind])
        return [_select(names, _sequence(entry, entry.tokens, entry.tokens, policy)) for entry in chosen]
    if operator in _CACHES and set(names) <= known:
        return [
            _select(names, _sequence(entry, entry.tokens, entry.tokens + 2 * TOKENS, policy))
            for entry in _new_tokens(kind, sequences)
            if "seq" in names or entry.tokens == 1  # else it takes single tokens alone
        ]
    if operator == "rotate" and set(names) <= {"n0", "n1", "n2"}:
        rows = int(shape.properties.get("heads", 32))
        return [{"n0": entry.batch, "n1": entry.tokens, "n2": rows} for entry in _new_tokens(kind, sequences)]
    if names and set(names) <= {"n", "n0", "n1", "n2", "count", "queries", "tiles"}:
        return [_select(names, _vectors(vectors, shape.operator)) for vectors in _VECTORS[kind]]
    return []


def _model_buckets(
    shape: KernelShape, names: Sequence[str], kind: str, sequences: Sequence[BatchShape]
) -> list[Bucket]:
    """One decode step and one prompt.

    Loops have one size, since those of decode and of prefill are two functions; so has an output layer, which works on
    the last token alone.
    """
    sizes = {"batch": ("d0", "batch"), "seq": ("d1", "seq")}
    if not set(names) <= {name for pair in sizes.values() for name in pair}:
        return []
    step, prompt = _parsed(_ROWS[kind])
    shapes = [entry for given in sequences for entry in (BatchShape(given.batch, 1), given)] or [step, prompt]
    if shape.operator == "loops":
        shapes = shapes[-1:]
    elif _is_output_layer(shape):
        shapes = [entry for entry in shapes if entry.tokens == 1]
    found = [
        {name: entry.batch if name in sizes["batch"] else entry.tokens for name in names} for entry in shapes
    ]
    return [bucket for index, bucket in enumerate(found) if bucket not in found[:index]]


def _is_output_layer(shape: KernelShape) -> bool:
    outputs = shape.properties.get("out_features", ())
    return len(outputs) == 1 and outputs[0] > _VOCABULARY * shape.properties["in_features"]


def bucket_label(bucket: Mapping[str, int]) -> str:
    """Spell a bucket in short: ``8x32K`` for sequences and stored tokens, ``+4K`` for new ones."""
    rest = dict(bucket)
    words = []
    if "d0" in rest:
        return "x".join(count(size) for size in rest.values())
    if "batch" in rest:
        tokens = TOKENS * rest.pop("tiles") if "tiles" in rest else None
        words.append(f"{rest.pop('batch')}" + (f"x{count(tokens)}" if tokens is not None else ""))
        rest.pop("blocks", None)
        words += [f"+{count(rest.pop('seq'))}"] if "seq" in rest else []
    if rest:
        words.append(f"n={count(math.prod(rest.values()))}")
    return " ".join(words)


def nearest_batches(buckets: Sequence[Bucket], batch: int | None) -> list[Bucket]:
    """The buckets whose number of sequences is nearest to ``batch``; all of them for None, any number."""
    if batch is None:
        return list(buckets)
    far = [bucket_distance(bucket, {"batch": batch, "n0": batch, "d0": batch}) for bucket in buckets]
    return [bucket for bucket, each in zip(buckets, far, strict=True) if each == min(far)]


def bucket_distance(bucket: Mapping[str, int], wanted: Mapping[str, int]) -> float:
    """How far a bucket is from wanted sizes, in doublings; sizes that are not wanted do not count."""
    return sum(abs(math.log2(bucket[name] / wanted[name])) for name in bucket if wanted.get(name))


def _parsed(texts: Iterable[str]) -> list[BatchShape]:
    return [BatchShape.parse(text) for text in texts]


def _new_tokens(kind: str, sequences: Sequence[BatchShape]) -> list[BatchShape]:
    if not sequences:
        return _parsed(_NEW_TOKENS[kind])
    return [BatchShape(batch, 1) for batch in dict.fromkeys(entry.batch for entry in sequences)]


def _sequence(entry: BatchShape, new: int, stored: int, policy: CachePolicy) -> Bucket:
    blocks = max(1, -(-stored // policy.center)) if policy.center else 1
    tiles = blocks * policy.center // TOKENS if policy.center else max(1, -(-stored // TOKENS))
    return {"batch": entry.batch, "seq": new, "tiles": tiles, "blocks": blocks}


def _vectors(vectors: int, operator: str) -> Bucket:
    tiles = -(-vectors // TOKENS)
    queries = 64 if operator == "score" else vectors
    return {"n": vectors, "n0": 1, "n1": 1, "n2": vectors, "count": tiles, "tiles": tiles, "queries": queries}


def _select(names: Sequence[str], sizes: Bucket) -> Bucket:
    return {name: sizes[name] for name in names}
