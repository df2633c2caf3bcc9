"""A model's attention as ``tvmc inspect`` tells it: sites with verdicts, near misses, pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tvm

from rotquant_tvm.errors import FormatError, ModelError, UsageError
from rotquant_tvm.frontend import ImportedModel, import_model
from rotquant_tvm.frontend.gather import gather_attention, near_misses
from rotquant_tvm.frontend.import_notes import import_notes
from rotquant_tvm.frontend.source_format import source_format
from rotquant_tvm.frontend.step_graph import StepGraph
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.passes.feature_probe import FeatureProbe
from rotquant_tvm.passes.find_attention import AttentionSite, find_attention
from rotquant_tvm.passes.site_rotary import site_rotary

_LAYER = re.compile(r"past_k_(\d+)$")


@dataclass(frozen=True)
class InspectedModel:
    """A model, or the graph of one that is refused.

    ``mod`` holds its function "main", ``source`` what near misses are looked for in; ``imported`` is None if it is
    ``refused``, and ``facts`` what else is known of it.
    """

    path: Path
    config: KVCacheConfig
    mod: tvm.IRModule
    source: tvm.IRModule
    facts: Mapping[str, Any]
    imported: ImportedModel | None = None
    refused: ModelError | None = None

    @classmethod
    def read(cls, path: Path, config: KVCacheConfig) -> InspectedModel:
        """Import a model; one that is refused is read as its source spells it, if that can be read.

        Raises ModelError if not even that can be done.
        """
        try:
            imported = import_model(path)
        except ModelError as error:
            graph = _as_spelled(path)
            if graph is None:
                raise
            gathered = gather_attention(graph.mod)
            return cls(path, config, gathered, graph.mod, graph.config, refused=error)
        return cls(path, config, imported.mod, imported.mod, imported.config, imported)

    @cached_property
    def sites(self) -> list[AttentionSite]:
        """The attention sites of "main"."""
        sites: list[AttentionSite] = find_attention(self.mod["main"])
        return sites

    @cached_property
    def described(self) -> list[dict[str, Any]]:
        """Every site as plain data."""
        probe = FeatureProbe(self.mod["main"])
        return [self._describe(probe, site) for site in self.sites]

    def _describe(self, probe: FeatureProbe, site: AttentionSite) -> dict[str, Any]:
        layer = _LAYER.match(site.key.past.name) if site.key is not None else None
        rotary = site_rotary(probe, site)
        described: dict[str, Any] = site.describe() | {
            "layer": int(layer[1]) if layer else site.index,
            "rotary": rotary and {"kind": rotary.kind, "dims": rotary.dims, "pairs": rotary.pairs},
        }
        return described | self._verdict(site)

    def _verdict(self, site: AttentionSite) -> dict[str, Any]:
        """The formats of a site's K and V, and what becomes of it."""
        formats = self.config.layer(site.index, len(self.sites))
        asked = {"k": formats.k.name, "v": formats.v.name}
        if site.reason:
            return {"k": None, "v": None}
        try:
            keeping = replace(self.config, on_unsupported="keep")
            fitted, kept = keeping.fitted([site.head_dim] * len(self.sites))  # others' are judged apart
        except FormatError as error:
            return asked | {"verdict": "refuse", "reason": str(error)}
        if site.index not in kept:
            return asked
        reason = "; ".join(dict.fromkeys(kept[site.index].values()))
        if self.config.on_unsupported == "refuse":
            return asked | {"verdict": "refuse", "reason": f"{reason} (--kv-on-unsupported keep: it stays in 16 bits)"}
        formats = fitted.layer(site.index, len(self.sites))
        return {"k": formats.k.name, "v": formats.v.name, "verdict": "keep", "reason": reason}

    def describe(self) -> dict[str, Any]:
        """The model as plain data."""
        imported = self.imported
        found = [
            {"variable": miss.variable.name, "operator": miss.operator, "reason": miss.reason}
            for miss in near_misses(self.source)
        ]
        return {
            "model": str(self.path),
            "model_type": self.facts.get("model_type") or source_format(self.path),
            "vocab_size": self.facts.get("vocab_size"),
            "max_position": self.facts.get("max_position"),
            "weights": len(imported.weights or ()) if imported is not None else None,
            "tokenizer": imported is not None and imported.tokenizer is not None,
            "refused": None if self.refused is None else str(self.refused),
            "sites": self.described,
            "near_misses": found,
            "notes": import_notes(self.facts),
        }

    def site(self, index: int) -> AttentionSite:
        """One site; raises UsageError if there is none of that number."""
        if index >= len(self.sites):
            raise UsageError(f"--site {index}: the model has {len(self.sites)} attention sites, numbered from 0")
        return self.sites[index]

    def picture(self, index: int | None) -> bytes:
        """An SVG picture of all sites, or of the dataflow around one before and after the passes."""
        model = f"{self.path.name} ({self.facts.get('model_type') or source_format(self.path)})"
        if index is not None:
            return self._dataflow(index, model)
        if self.imported is None:
            raise UsageError("--svg draws all sites of a model that can be imported; give --site N for one of these")
        from rotquant_tvm.cli.site_drawing import draw_sites
        from rotquant_tvm.cli.site_graph import site_graph

        return draw_sites(site_graph(self.imported, self.sites, self.described), f"attention sites of {model}")

    def _dataflow(self, index: int, model: str) -> bytes:
        from rotquant_tvm.cli.dataflow_drawing import draw_dataflow
        from rotquant_tvm.cli.site_dataflow import site_dataflow

        self.site(index)
        panels: dict[str, Any] = {"before the passes": site_dataflow(self.mod, "main", index)}
        heading = f"decode after the passes, {self.config.name}"
        try:
            panels[heading] = site_dataflow(self.rewritten(), "decode", index)
        except (ModelError, FormatError) as error:
            panels[heading] = f"refused: {error}"
        return draw_dataflow(panels, f"attention site {index} of {model}")

    def rewritten(self) -> tvm.IRModule:
        """The module after the passes on the cache, before those that pack weights; for this CPU."""
        from rotquant_tvm.pass_hooks import PassHooks
        from rotquant_tvm.pipeline import kv_passes, pass_context, run_passes
        from rotquant_tvm.target import resolve_target

        if self.refused is not None:
            raise self.refused
        target = resolve_target("llvm")
        passes = kv_passes(self.config, target)
        last = [str(step.info.name) for step in passes].index("LowerKVOps")
        with pass_context(PassHooks()):
            return run_passes(self.mod, passes[: last + 1], target)


def _as_spelled(path: Path) -> StepGraph | None:
    """The step of a file that spells its attention itself; None for other sources. Raises ModelError."""
    found = source_format(path)
    if found == "onnx":
        from rotquant_tvm.frontend.onnx_import import read_onnx

        return read_onnx(path)
    if found == "pt2":
        from rotquant_tvm.frontend.torch_program import program_step
        from rotquant_tvm.frontend.torch_program_archive import load_program

        return program_step(load_program(path), str(path))
    return None
