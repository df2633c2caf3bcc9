"""Compile a decoder model into a library with a packed, rotation-quantized KV cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax

from .cache_policy import MOST_TOKENS
from .codegen import compile_module
from .errors import UsageError
from .frontend import ImportedModel, TokenizerData, import_model
from .frontend.import_notes import import_notes
from .frontend.source_format import source_format
from .input_shapes import fixed_batch
from .kernel_report import FUNCTIONS
from .kv_cache_config import KVCacheConfig
from .linker import export_library, linker_command
from .pass_hooks import PassHooks, PassTimer
from .pipeline import check_pass_names, kv_passes, operator_passes, pass_context, pass_names, run_passes
from .report import compile_report
from .session_limits import session_limits
from .target import resolve_target
from .tuning.record_lookup import TuningRecords
from .tuning.shape_buckets import WantedSizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from tvm.runtime import Tensor

    from .runtime import Artifact, CompiledLibrary, Session, TokenizerSpec

DEFAULT_CAPACITY = 4096
Progress = Callable[[str], None]


@dataclass(frozen=True)
class CompiledModel:
    """A compiled library with its weights, ready to save or to run.

    Attributes: ``executable`` (TVM's), ``info`` (what ``kv_cache_info()`` returns), ``weights`` (as the
    library takes them; None for a model of shapes alone), ``weight_types`` (shape and dtype of each), ``report``
    (formats, true bits, bytes, kernels, times, capacity; plain data),
    ``target``, ``tokenizer``, ``default_capacity`` (tokens per sequence of a session that names none), ``config`` (of
    the cache), ``source`` (what was compiled: type, name and format; plain data).
    """

    executable: Any
    info: dict[str, Any]
    weights: list[np.ndarray] | None
    weight_types: list[tuple[tuple[int, ...], str]]
    report: dict[str, Any]
    target: tvm.target.Target
    tokenizer: TokenizerData | None
    default_capacity: int
    config: KVCacheConfig
    source: Mapping[str, Any]

    def save(self, path: str | os.PathLike[str]) -> Artifact:
        """Write the artifact folder ``path``; it appears whole or not at all.

        CUDA code is compiled for the target's architecture first, if nvcc or NVRTC is found. Raises ``UsageError``,
        also for a model of shapes alone, or ``DeviceError`` if there is no compiler to link the library with.
        """
        from .codec_data import codec_data
        from .device_code import PackedImports
        from .runtime import write_artifact
        from .target_requirements import requirements

        if self.weights is None:
            raise UsageError("the model was compiled from shapes alone, and an artifact needs weights")
        linker_command()
        imports = PackedImports.of(self.executable.mod, self.target)
        return write_artifact(
            path,
            partial(export_library, self.executable, pack_imports=imports.write),
            dict(zip(self.info["weights"], self.weights, strict=True)),
            kv_cache_info=self.info,
            target=str(self.target),
            report=self.report,
            tokenizer_json=None if self.tokenizer is None else self.tokenizer.json,
            tokenizer=self._tokenizer_spec(),
            default_capacity=self.default_capacity,
            requires=requirements(self.target, imports.code),
            model=self.source,
            codecs=codec_data(self.info, self.config),
        )

    def library(self, device: str = "cpu", weights: Sequence[np.ndarray | Tensor] | None = None) -> CompiledLibrary:
        """Return the library in this process, without a file between.

        ``weights``: of ``weight_types``, in the place of the model's own. Raises ``UsageError`` where there are none.
        """
        from .runtime import CompiledLibrary
        from .runtime.device import parse_device
        from .runtime.tokenizer import TextTokenizer

        weights = self.weights if weights is None else weights
        if weights is None:
            raise UsageError("the model was compiled from shapes alone; give the library its weights")
        spec = self._tokenizer_spec()
        text = None if self.tokenizer is None else TextTokenizer(self.tokenizer.json, spec)
        return CompiledLibrary(
            self.executable.jit(),
            weights,
            parse_device(device),
            tokenizer=text,
            eos_token_ids=spec.eos_token_ids,
            report=self.report,
            default_capacity=self.default_capacity,
        )

    def session(self, batch: int | None = None, capacity: int | None = None, device: str = "cpu") -> Session:
        """Start a session over ``library(device)``."""
        return self.library(device).session(batch, capacity)

    def _tokenizer_spec(self) -> TokenizerSpec:
        from .runtime import TokenizerSpec

        data = self.tokenizer
        if data is None:
            return TokenizerSpec()
        return TokenizerSpec(data.eos_token_ids, data.bos_token_id, data.chat_template)


def compile(
    model: str | os.PathLike[str] | PreTrainedModel | ImportedModel,
    kv_cache: str | KVCacheConfig = "rq3",
    target: str | tvm.target.Target = "llvm",
    *,
    kv_layers: str | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    capacity: int = DEFAULT_CAPACITY,
    dtype: str = "float32",
    every_logit: bool = False,
    tuning_records: str | os.PathLike[str] | None = None,
    opt_level: int = 3,
    pass_config: Mapping[str, Any] | None = None,
    hooks: PassHooks | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """Compile a decoder model.

    ``model``: a transformers causal LM, its directory, a .gguf file, or what ``import_model`` returned.
    ``kv_cache``: ``K`` or ``K/V`` in the spelling of ``KVFormat.parse``; ``kv_layers`` overrides layers
    (``"0,-1=f16"``) of such a text. ``target``: ``"llvm"`` (this CPU), ``"cuda"`` (this GPU) or any TVM target of these
    kinds. ``input_shapes``: ``{"ids": [1, -1]}`` compiles for that batch alone, by default for any.
    ``capacity``: tokens per sequence of a session that names none; lowered to the model's positions,
    and in the report as ``default_capacity``. ``dtype`` of the weights when they
    come from files. ``every_logit``: the library can return the logits after every token of a call (``Session.verify``,
    for speculative decoding); a model that ``import_model`` returned was imported so or not.
    ``tuning_records``: a tuning log or a folder of them, which come before the user's and the packaged ones; of a
    kernel's records the one made nearest to ``capacity`` and the batch counts (an open batch as 1). On GPUs a KV kernel
    has those of other sizes too, where they differ, and each launch takes the nearest. ``opt_level`` and
    ``pass_config`` are TVM's; ``hooks`` watch or disable passes. ``progress`` is called with the name of each stage.
    Raises ``UsageError``, ``FormatError``, ``ModelError``
    or ``DeviceError``.
    """
    config = KVCacheConfig.of(kv_cache, kv_layers)
    batch = fixed_batch(input_shapes)
    if not 1 <= capacity <= MOST_TOKENS:
        raise UsageError(f"the capacity is {capacity} tokens; it must be 1 or more and at most {MOST_TOKENS}")
    target = resolve_target(target)
    records = TuningRecords(target, None if tuning_records is None else Path(tuning_records))
    hooks = hooks or PassHooks()
    check_pass_names(hooks.disabled, target)
    timer = PassTimer()
    context = pass_context(hooks.timed(timer), opt_level, pass_config)
    stages = _Stages(progress)
    stages.start("import")
    imported = model if isinstance(model, ImportedModel) else import_model(model, dtype=dtype, every_logit=every_logit)
    if every_logit and not imported.every_logit:
        raise UsageError("every_logit: the model was imported without it; use import_model(source, every_logit=True)")
    capacity = min(capacity, imported.config["max_position"] or capacity)
    mod = _with_batch(_with_limit(imported), batch)
    with context:
        stages.start("rewrite the KV cache")
        mod = run_passes(mod, kv_passes(config, target, imported.every_logit), target)
        stages.start("pack weights")
        mod, weights = _final_weights(mod, imported.weights)
        stages.start("schedule")
        mod = run_passes(mod, operator_passes(target, records, WantedSizes(batch, capacity, others=True)), target)
        pass_seconds = timer.seconds(pass_names(target))  # before TVM runs some of the same passes again
        mod = _with_limits(mod, target)
        stages.start("generate code")
        executable = compile_module(mod, target)
    stages.start("")
    from .passes.quantize_kv_cache import read_cache_info

    info = read_cache_info(mod)
    report = compile_report(info, imported.config, target, stages.seconds, mod, pass_seconds)
    report |= {"default_capacity": capacity, "warnings": list(dict.fromkeys(records.warnings))}
    report["notes"] = import_notes(imported.config)
    types, source = _weight_types(mod), _described(model, imported, config)
    return CompiledModel(
        executable, info, weights, types, report, target, imported.tokenizer, capacity, config, source
    )


def _described(model: object, imported: ImportedModel, config: KVCacheConfig) -> dict[str, Any]:
    """What an artifact says of the model that it was made from."""
    path = Path(model) if isinstance(model, str | os.PathLike) else None
    overrides = {str(index): formats.name for index, formats in sorted(config.overrides.items())}
    return {
        "type": imported.config["model_type"],
        "name": None if path is None else path.resolve().name,
        "format": None if path is None else source_format(path),
        "kv_cache": config.name,
        "kv_layers": overrides,
        "seed": config.seed,
    }


class _Stages:
    """Times the stages of a compile and tells their names as they begin."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._name, self._since = "", time.perf_counter()

    def start(self, name: str) -> None:
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = now - self._since
        self._name, self._since = name, now
        if name and self.progress is not None:
            self.progress(name)


def _with_limits(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    from .passes.quantize_kv_cache import read_cache_info, with_cache_info

    limits = session_limits(mod, target)
    return with_cache_info(mod, read_cache_info(mod) | limits) if limits else mod


def _with_limit(imported: ImportedModel) -> tvm.IRModule:
    limit = imported.config["max_position"]
    if limit is None:
        return imported.mod
    mod = imported.mod.clone()
    mod["main"] = mod["main"].with_attr("rotquant.max_position", int(limit))
    return mod


def _with_batch(mod: tvm.IRModule, batch: int | None) -> tvm.IRModule:
    """Return the module for sequences of this number alone; None leaves it as it is."""
    if batch is None:
        return mod
    size = mod["main"].params[0].ty.shape[0]
    if isinstance(size, tvm.tirx.IntImm):
        if int(size) != batch:
            raise UsageError(f"input ids: batch is {batch}, and the model was imported for {int(size)}")
        return mod
    return relax.transform.BindSymbolicVars({size: batch}, "main")(mod)


def _final_weights(
    mod: tvm.IRModule, weights: list[np.ndarray] | None
) -> tuple[tvm.IRModule, list[np.ndarray] | None]:
    """Return the weights as the rewritten functions take them, and the module describing them."""
    from .passes.quantize_kv_cache import read_cache_info, with_cache_info
    from .passes.weight_recipes import make_weights, weight_recipes

    recipes = weight_recipes(mod["decode"])
    steps = {gvar.name_hint for gvar in mod.get_global_vars()}.intersection(FUNCTIONS)
    if any(weight_recipes(mod[name]) != recipes for name in steps):
        raise RuntimeError("the library's functions disagree about the packed weights")
    final = None if weights is None else [np.asarray(w) for w in make_weights(mod["decode"], weights)]
    info = read_cache_info(mod)
    info["weights"] = [f"weight_{i:04d}" for i in range(len(recipes))]
    batch = mod["decode"].params[0].ty.shape[0]
    if isinstance(batch, tvm.tirx.IntImm):
        info["batch"] = int(batch)
    return with_cache_info(mod, info), final


def _weight_types(mod: tvm.IRModule) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of each weight that the functions take."""
    func = mod["decode"]
    weights = func.params[int(func.attrs["num_input"]) :]
    return [(tuple(int(size) for size in weight.ty.shape), str(weight.ty.dtype)) for weight in weights]
