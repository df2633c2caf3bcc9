"""The cache configuration: which K and V format each layer uses, and the cache policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .cache_policy import NO_POLICY, CachePolicy, read_options
from .errors import FormatError, UsageError
from .formats import Codec, KVFormat, parse_pair, preset_of

_PRESET_POLICY = CachePolicy(sinks=4, recent=8, center=64)
PRESETS = dict.fromkeys(("rq2", "rq3", "rq4"), _PRESET_POLICY)
"""The cache policy of each preset (``docs/evaluation.md`` says how it was found); their formats are in ``formats``."""

ON_UNSUPPORTED = ("refuse", "keep")


@dataclass(frozen=True)
class LayerFormats:
    """The K and V format of one layer."""

    k: KVFormat
    v: KVFormat

    @classmethod
    def parse(cls, text: str) -> LayerFormats:
        """Read ``K/V`` or one format for both; raises ``FormatError``."""
        return cls(*parse_pair(text))

    @property
    def name(self) -> str:
        """The shortest spelling."""
        return self.k.name if self.k == self.v else f"{self.k.name}/{self.v.name}"


@dataclass(frozen=True)
class KVCacheConfig:
    """What ``QuantizeKVCache`` stores: the formats, ``overrides`` by layer index, and the cache policy.

    ``seed`` (0 or more) draws the rotations; layer i's keys and values get their own. With ``quantize_chunk`` prefill
    quantizes and dequantizes the keys and values of its own chunk before attention reads them, so that every token is
    quantized before it is attended: for evaluation. ``on_unsupported``: with "keep", keys or values whose head
    dimension their format cannot take stay in 16 bits; with "refuse" the model is refused. Raises ``UsageError`` for
    another seed or another word.
    """

    formats: LayerFormats
    overrides: dict[int, LayerFormats] = field(default_factory=dict)
    seed: int = 0
    policy: CachePolicy = NO_POLICY
    quantize_chunk: bool = False
    on_unsupported: str = "refuse"

    def __post_init__(self) -> None:
        if self.on_unsupported not in ON_UNSUPPORTED:
            raise UsageError(f"on_unsupported is '{self.on_unsupported}'; it must be {' or '.join(ON_UNSUPPORTED)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"the seed of the rotations is {self.seed!r}; it must be an integer, 0 or more")

    @classmethod
    def of(cls, kv_cache: str | KVCacheConfig, layers: str | None = None) -> KVCacheConfig:
        """Return a configuration as it is, or read it from texts as ``parse`` does.

        Raises ``UsageError`` if ``layers`` are given beside a configuration, which has its own.
        """
        if not isinstance(kv_cache, KVCacheConfig):
            return cls.parse(kv_cache, layers)
        if layers is not None:
            raise UsageError("kv_layers goes with formats given as text; a KVCacheConfig has its own overrides")
        return kv_cache

    @classmethod
    def parse(cls, text: str, layers: str | None = None, seed: int = 0) -> KVCacheConfig:
        """Read ``--kv-cache`` and ``--kv-layers`` texts: ``"rq3"``, ``"iso3/planar3"`` and ``"0,-1=f16;5=iso4"``.

        Options of the cache policy follow the formats: ``"iso3,sinks=4,recent=64,center=64"``; a preset brings its own,
        which they replace. Negative layers count from the end. Raises ``FormatError`` or ``UsageError``, also for a
        layer that is named twice.
        """
        formats, _, options = str(text).partition(",")
        overrides = _read_overrides(layers or "")
        named = [PRESETS[preset] for preset in map(preset_of, formats.split("/")) if preset]
        policy = (named[0] if named else CachePolicy()).changed(read_options(options))
        return cls(LayerFormats.parse(formats.strip()), overrides, seed, policy)

    @property
    def name(self) -> str:
        """Formats and policy as ``parse`` reads them (overrides apart): ``hurwitz3,sinks=4,recent=32,center=64``."""
        return ",".join(filter(None, (self.formats.name, self.policy.name)))

    def layer_policy(self, index: int, count: int) -> CachePolicy:
        """The policy of a layer: none where keys and values are 16-bit anyway."""
        formats = self.layer(index, count)
        return CachePolicy() if formats.k.bits == formats.v.bits == 16 else self.policy

    def layer(self, index: int, count: int) -> LayerFormats:
        """The formats of layer ``index`` of ``count``.

        Raises ``UsageError`` for overrides of a layer that there is not, and for two of one layer that differ.
        """
        for key, formats in self.overrides.items():
            if not -count <= key < count:
                raise UsageError(f"layer override {key}: the model has layers 0 to {count - 1}")
            other = self.overrides.get(key + count, formats)  # "0,-1=f16" may name the only layer twice
            if key < 0 and other != formats:
                raise UsageError(
                    f"layer {key + count} of {count} is {other.name} as {key + count} and {formats.name} as {key} in "
                    "the layer overrides; name it once"
                )
        return self.overrides.get(index, self.overrides.get(index - count, self.formats))

    def fitted(self, head_dims: Sequence[int]) -> tuple[KVCacheConfig, dict[int, dict[str, str]]]:
        """The configuration for layers of these head dimensions, and by layer why its "k" or "v" stay in 16 bits.

        With ``on_unsupported`` "refuse" nothing changes. Raises ``FormatError`` if not even 16-bit formats take a head
        dimension.
        """
        kept: dict[int, dict[str, str]] = {}
        if self.on_unsupported == "refuse":
            return self, kept
        overrides, plain, count = dict(self.overrides), KVFormat.parse("f16"), len(head_dims)
        for index, head_dim in enumerate(head_dims):
            formats = self.layer(index, count)
            for role in ("k", "v"):
                try:
                    getattr(formats, role).check(head_dim)
                except FormatError as error:
                    plain.check(head_dim)
                    kept.setdefault(index, {})[role] = str(error)
            if index in kept:
                overrides.pop(index - count, None)
                overrides[index] = replace(formats, **dict.fromkeys(kept[index], plain))
        return replace(self, overrides=overrides), kept

    def codecs(self, index: int, count: int, head_dim: int) -> tuple[Codec, Codec]:
        """The K and V codec of a layer; raises ``FormatError`` if a format cannot take ``head_dim``."""
        formats = self.layer(index, count)
        return (
            formats.k.codec(head_dim, seed=(self.seed, index, 0)),
            formats.v.codec(head_dim, seed=(self.seed, index, 1)),
        )


def _read_overrides(text: str) -> dict[int, LayerFormats]:
    """Read ``"0,-1=f16;5=iso4"``; raises ``FormatError`` or ``UsageError``."""
    overrides: dict[int, LayerFormats] = {}
    for part in filter(None, (p.strip() for p in text.split(";"))):
        indices, sign, name = part.partition("=")
        try:
            numbers = [int(i) for i in indices.split(",")]
        except ValueError:
            numbers = []
        if not sign or not numbers or "=" in name:
            raise UsageError(
                f"cannot read the layer overrides '{part}'; write them like '0,-1=f16;5=iso4', each layer once and a ; "
                "before those of another format"
            )
        formats = LayerFormats.parse(name.strip())
        for number in numbers:
            if number in overrides:
                raise UsageError(f"the layer overrides '{text.strip()}' name layer {number} twice; name it once")
            overrides[number] = formats
    return overrides
