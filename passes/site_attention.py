"""The calls that stand for one attention over the packed cache: append, dequantize, dense attention."""

from __future__ import annotations

from dataclasses import dataclass, field

from tvm import relax

from rotquant_tvm.formats import TOKENS, Codec, Rotation
from rotquant_tvm.ops.site_shape import SiteShape

from .binding_copy import BindingCopy
from .find_attention import AttentionSite
from .kv_kernels import KernelLibrary, rotation_constant
from .layer_cache import LayerCache


@dataclass(frozen=True)
class StepLengths:
    """Variables int32 [batch] of one call: lengths with its tokens, how many are new, and tokens in tiles.

    ``before`` and ``packed`` (after this call's flush) are None if no layer has a policy.
    """

    total: relax.Var
    new: relax.Var
    before: relax.Var | None = None
    packed: relax.Var | None = None


@dataclass(frozen=True)
class SiteAttention:
    """Emits attentions into ``builder``; with ``chunk`` several tokens are new, and see each other.

    ``quantize``: a chunk's tokens are quantized and dequantized before anything sees them. ``as_decode``: they see each
    other as one-by-one decode would show them, where that quantizes a token at once. ``appended`` collects arrays that
    were updated and have no reader.
    """

    builder: relax.BlockBuilder
    kernels: KernelLibrary
    copy: BindingCopy
    layers: list[tuple[LayerCache, list[relax.Var]]]
    lengths: StepLengths
    chunk: bool
    quantize: bool
    as_decode: bool = False
    appended: list[relax.Var] = field(default_factory=list)

    def emit(self, site: AttentionSite) -> relax.Var:
        """Emit the attention of ``site`` and return its output."""
        layer, arrays = self.layers[site.index]
        query = self.copy.expr(site.call.args[0])
        new = [self.copy.expr(cache.new) for cache in (site.key, site.value)]
        shape = SiteShape(
            layer.codec_k.format.name,
            layer.codec_v.format.name,
            site.heads,
            site.kv_heads,
            site.head_dim,
            site.scale,
            site.window,
            str(query.ty.dtype),
            self.chunk,
            policy=layer.policy.name,
            softcap=site.softcap,
        )
        if self.quantize:
            new = self._quantized(layer, new)
        return (
            self._segmented(layer, shape, arrays, query, new)
            if layer.policy.segmented
            else self._straight(layer, shape, arrays[0], query, new)
        )

    def _straight(
        self, layer: LayerCache, shape: SiteShape, cache: relax.Var, query: relax.Var, new: list[relax.Var]
    ) -> relax.Var:
        """Every token is quantized as it comes, and then attended to; a chunk's tokens see each other raw or so.

        Into a ring of tiles a chunk comes after the attention, which reads what it takes the place of.
        """
        first = not (shape.wraps and self.chunk)
        if first:
            cache = self._append_tiles(layer, shape, cache, new, [])
        past = self._past(
            layer, self.kernels.dequantize_cache(shape), [cache], cache.ty.shape[2] * TOKENS, self.lengths.total
        )
        seen = self._as_stored(layer, new) if self.as_decode and not self.quantize else new
        operands = [query, *past, *(seen if self.chunk else ()), self.lengths.total, self.lengths.new]
        output = self.builder.emit(relax.call_tir(self.kernels.attention_dense(shape), operands, query.ty))
        if not first:
            self.appended.append(self._append_tiles(layer, shape, cache, new, [output]))
        return output

    def _append_tiles(
        self, layer: LayerCache, shape: SiteShape, cache: relax.Var, new: list[relax.Var], after: list[relax.Var]
    ) -> relax.Var:
        """Quantize new tokens into tiles; returns the cache as it is then."""
        rotations = [rotation_constant(c.rotation) for c in layer.codecs]
        arguments = relax.Tuple([cache, *new, *rotations, self.lengths.total, self.lengths.new, *after])
        kernel = self.kernels.append(shape, bool(after))
        return self.builder.emit(relax.op.call_tir_inplace(kernel, arguments, 0, cache.ty))

    def _segmented(
        self, layer: LayerCache, shape: SiteShape, arrays: list[relax.Var], query: relax.Var, new: list[relax.Var]
    ) -> relax.Var:
        """New tokens enter the 16-bit segments, rotated; a chunk reads the past before they do."""
        rotated = [self._rotate(x, codec.rotation) for x, codec in zip(new, layer.codecs, strict=True)]
        if not self.chunk:
            arrays = self._append(layer, shape, arrays, rotated, [])
        packed = self.lengths.before if self.chunk else self.lengths.packed
        longest = arrays[0].ty.shape[2] * TOKENS + (layer.policy.sinks + layer.policy.ring)
        stored = self.lengths.total
        if self.chunk and shape.wraps:  # which tokens a ring's rows are depends on how many are stored
            stored = self.builder.emit(relax.op.subtract(stored, self.lengths.new))
        past = self._past(layer, self.kernels.dequantize_segments(shape), [*arrays, packed], longest, stored)
        chunk = []
        if self.chunk:
            chunk = [self._rotate(x, c.inverse_rotation) for x, c in zip(rotated, layer.codecs, strict=True)]
        operands = [query, *past, *chunk, self.lengths.total, self.lengths.new]
        output = self.builder.emit(relax.call_tir(self.kernels.attention_dense(shape), operands, query.ty))
        if not self.chunk:
            return output
        # Nothing else would keep the attention before the append, whose tokens take the slots of those it reads.
        self.appended.append(self._append(layer, shape, arrays, rotated, [output])[-1])
        return output

    def joined(self, logits: relax.Expr) -> relax.Expr:
        """The logits, once everything is appended."""
        if not self.appended:
            return logits
        logits = self.builder.emit(logits)
        kind, *others = [(array.ty.ndim, str(array.ty.dtype)) for array in (logits, *self.appended)]
        kernel = self.kernels.join(kind, tuple(others))
        return relax.op.call_tir_inplace(kernel, relax.Tuple([logits, *self.appended]), 0, logits.ty)

    def _append(
        self,
        layer: LayerCache,
        shape: SiteShape,
        arrays: list[relax.Var],
        rotated: list[relax.Var],
        after: list[relax.Var],
    ) -> list[relax.Var]:
        """Flush, then append to the 16-bit segments; returns the arrays as they are then."""
        emit, lengths, kernels = self.builder.emit, self.lengths, self.kernels
        *tiles, plain = arrays
        counts = [lengths.before, lengths.packed, lengths.total, lengths.new]
        flush = relax.Tuple([*tiles, plain, *rotated, *counts, *after])
        kernel = kernels.flush(shape, bool(after))
        types = [tile.ty for tile in tiles]
        flushed = emit(
            relax.op.call_tir_inplace(kernel, flush, list(range(len(tiles))), types if len(types) > 1 else types[0])
        )
        tiles = [emit(relax.TupleGetItem(flushed, i)) for i in range(len(tiles))] if len(tiles) > 1 else [flushed]
        entering = relax.Tuple([plain, *rotated, lengths.packed, lengths.total, lengths.new, tiles[0]])
        plain = emit(relax.op.call_tir_inplace(kernels.append_plain(shape), entering, 0, plain.ty))
        return [*tiles, plain]

    def _past(
        self, layer: LayerCache, kernel: object, arrays: list[relax.Var], longest: object, stored: relax.Var
    ) -> list[relax.Var]:
        """The stored keys and values, dequantized and un-rotated; ``stored``: how many there are per sequence."""
        emit = self.builder.emit
        batch, heads, *_ = arrays[0].ty.shape
        dense = relax.TensorType([batch, heads, longest, layer.site.head_dim], "float32")
        pair = emit(relax.call_tir(kernel, [*arrays, stored], [dense, dense]))
        parts = [emit(relax.TupleGetItem(pair, i)) for i in range(2)]
        return [self._rotate(x, codec.inverse_rotation) for x, codec in zip(parts, layer.codecs, strict=True)]

    def _quantized(self, layer: LayerCache, new: list[relax.Var]) -> list[relax.Var]:
        """What becomes of new keys and values: each block less its centre goes through its format and back."""
        emit, kernels, policy = self.builder.emit, self.kernels, layer.policy
        results = []
        for role, (x, codec) in enumerate(zip(new, layer.codecs, strict=True)):
            rotated = self._rotate(x, codec.rotation)
            center = policy.center if role == 0 else 0
            split = kernels.split_centre(layer.site, str(x.ty.dtype), policy.sinks, center)
            pair = emit(relax.call_tir(split, [rotated, self.lengths.new], [x.ty, x.ty]))
            remainder, centre = (emit(relax.TupleGetItem(pair, i)) for i in range(2))
            results.append(self._rotate(emit(self._roundtrip(codec, remainder) + centre), codec.inverse_rotation))
        return results

    def _as_stored(self, layer: LayerCache, new: list[relax.Var]) -> list[relax.Var]:
        """What will be read of new keys and values once they are stored."""
        results = []
        for x, codec in zip(new, layer.codecs, strict=True):
            stored = self._roundtrip(codec, self._rotate(x, codec.rotation))
            results.append(self._rotate(stored, codec.inverse_rotation))
        return results

    def _roundtrip(self, codec: Codec, x: relax.Var) -> relax.Var:
        here = codec.in_rotated_basis()
        constants = [rotation_constant(r) for r in (here.rotation, here.inverse_rotation)]
        kernel = self.kernels.roundtrip(here, str(x.ty.dtype))
        return self.builder.emit(relax.call_tir(kernel, [x, *constants], x.ty))

    def _rotate(self, x: relax.Var, rotation: Rotation) -> relax.Var:
        if rotation.identity:
            return x
        kernel = self.kernels.rotate(rotation.structure, rotation.head_dim, str(x.ty.dtype))
        return self.builder.emit(relax.call_tir(kernel, [x, rotation_constant(rotation)], x.ty))
