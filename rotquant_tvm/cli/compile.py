"""Compile a model into an artifact: a library with a packed KV cache, its weights and its tokenizer.

For example:
  tvmc compile model.gguf --kv-cache rq3 -o model.rq
  tvmc compile ./llama --kv-cache iso3/planar3 --kv-layers "0,-1=f16" --target cuda
  tvmc compile model.gguf --kv-cache iso3 --kv-sinks 4 --kv-recent 8 --kv-center 64
  tvmc compile model.gguf --input-shapes "ids:[1,-1]"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotquant_tvm.cli import dump_code, model_files, pass_options
from rotquant_tvm.cli.options import add_kv_options, input_shapes, kv_cache_config, words
from rotquant_tvm.cli.output import Output
from rotquant_tvm.errors import LogError, UsageError
from rotquant_tvm.frontend.source_format import EXPECTED

if TYPE_CHECKING:
    from rotquant_tvm import CompiledModel, KVCacheConfig
    from rotquant_tvm.runtime import Requirements

SUMMARY = "compile a model with a packed KV cache"
_STEPS = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tvmc compile``."""
    parser.add_argument("model", metavar="MODEL", help=EXPECTED)
    parser.add_argument(
        "--model-format",
        choices=model_files.FORMATS,
        help="refuse MODEL unless it is of this format (default: whatever it is)",
    )
    parser.add_argument(
        "--target",
        default="llvm",
        help="llvm (this CPU), cuda (this GPU), a TVM target with options, a tag, or a file with one (default: llvm)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the weights; GPUs compute in it, too, CPUs in float32 (default: float32)",
    )
    parser.add_argument(
        "--tuning-records",
        metavar="DIR",
        type=Path,
        help="a tuning log or a folder of them, before the user's and the packaged ones (see tvmc logs list)",
    )
    parser.add_argument(
        "--input-shapes",
        metavar="SHAPES",
        type=input_shapes,
        help="'ids:[4,-1]' compiles for a batch of 4 alone; -1 is dynamic (default: ids:[-1,-1])",
    )
    parser.add_argument(
        "--every-logit",
        action="store_true",
        help="the library can also return the logits after every token of a call, for speculative decoding",
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="the artifact's folder (default: MODEL's name with .rq, here)"
    )
    parser.add_argument(
        "--dump-code",
        metavar="KIND,…",
        type=words(*dump_code.KINDS),
        default=[],
        help=f"write code beside the output as files: {', '.join(dump_code.KINDS)}",
    )
    add_kv_options(parser)
    pass_options.add_pass_options(parser)


def execute(arguments: argparse.Namespace, output: Output) -> None:
    """Compile; every cheap check comes before torch and TVM are loaded."""
    from rotquant_tvm.artifact_folder import check_output
    from rotquant_tvm.linker import linker_command

    config = kv_cache_config(arguments)
    configuration = pass_options.pass_config(arguments.pass_config)
    artifact = _artifact_path(arguments)
    check_output(artifact)
    dump_code.check_dumps(artifact, arguments.dump_code)
    model = model_files.check_model(arguments.model, arguments.model_format)
    if arguments.tuning_records is not None and not arguments.tuning_records.is_dir():
        raise LogError(f"--tuning-records: {arguments.tuning_records} is no folder; see tvmc logs list")
    linker_command()
    with output.steps(_STEPS, "load TVM") as step:
        step("load TVM")
        watch = pass_options.PassWatch(arguments, output)
        compiled, code = _compile(arguments, model, config, configuration, watch, step, output)
        step("write" if compiled.target.kind.name == "llvm" else "compile the kernels and write")
        requires = compiled.save(artifact).manifest.requires
        files = dump_code.write_code(artifact, code)
    watch.report_idle()
    for warning in compiled.report["warnings"]:
        output.note(f"warning: {warning}")
    for note in compiled.report["notes"]:
        output.note(note)
    for layer in compiled.report["layers"]:
        for role, reason in layer["kept"].items():
            output.note(f"layer {layer['layer']}: {role.upper()} stays in 16 bits: {reason}")
    if requires is not None and requires.cuda_code == "cuda":
        output.note(
            "warning: no CUDA compiler was found (nvcc, or the package cuda-bindings), so the kernels stay source: a "
            "machine that loads the library needs TVM's compiler and one of these"
        )
    if compiled.default_capacity < arguments.kv_capacity:
        output.note(
            f"sessions hold {compiled.default_capacity} tokens per sequence, not {arguments.kv_capacity}: "
            "there the model's positions end"
        )
    _show(compiled, artifact, requires, files, watch, output)


def _artifact_path(arguments: argparse.Namespace) -> Path:
    if arguments.output is not None:
        if not arguments.output:
            raise UsageError("-o: the output's name is empty")
        return Path(arguments.output).resolve()
    model = Path(arguments.model).resolve()
    return Path.cwd() / f"{model.name if model.is_dir() else model.stem}.rq"


def _compile(
    arguments: argparse.Namespace,
    model: Path,
    config: KVCacheConfig,
    configuration: dict[str, Any],
    watch: pass_options.PassWatch,
    step: Any,
    output: Output,
) -> tuple[CompiledModel, dict[str, str]]:
    from rotquant_tvm.compiler import compile
    from rotquant_tvm.pipeline import check_pass_names, kv_passes, operator_passes, pass_names
    from rotquant_tvm.target import resolve_target

    target = resolve_target(arguments.target)
    output.detail(f"target {target}")
    output.detail(f"passes {', '.join(pass_names(target))}; -O{arguments.opt_level} {configuration or ''}")
    dump_code.check_kinds(arguments.dump_code, target)
    check_pass_names(sorted(watch.names), target)
    last_graph, last_scheduled = (
        str(passes[-1].info.name) for passes in (kv_passes(config, target), operator_passes(target))
    )
    watch.wanted_snapshots = {last_graph, last_scheduled} if arguments.dump_code else set()
    compiled = compile(
        model,
        config,
        target,
        input_shapes=arguments.input_shapes,
        capacity=arguments.kv_capacity,
        dtype=arguments.dtype,
        every_logit=arguments.every_logit,
        tuning_records=arguments.tuning_records,
        opt_level=arguments.opt_level,
        pass_config=configuration,
        hooks=watch.hooks(),
        progress=step,
    )
    code = dump_code.collect_code(
        arguments.dump_code,
        watch.snapshots.get(last_graph),
        watch.snapshots.get(last_scheduled),
        compiled.executable.mod,
        target,
    )
    return compiled, code


def _show(
    compiled: CompiledModel,
    artifact: Path,
    compiled_for: Requirements | None,
    files: list[Path],
    watch: pass_options.PassWatch,
    output: Output,
) -> None:
    from rotquant_tvm.cli.report_table import report_parts, target_text
    from rotquant_tvm.runtime.manifest import TOKENIZER_FILE

    report = compiled.report
    document: dict[str, Any] = {
        "artifact": str(artifact),
        "default_capacity": compiled.default_capacity,
        "tokenizer": (artifact / TOKENIZER_FILE).is_file(),
        "report": report,
        "requires": None if compiled_for is None else compiled_for.document(),
        "files": [str(file) for file in files],
    }
    shown = report_parts(report)
    if watch.timer is not None:
        document["pass_times"] = pass_options.pass_times(watch.timer)
        shown.append(pass_options.pass_times_table(watch.timer))
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report["seconds"].items())
    shown.append(f"compiled for {target_text(report['target'])}: {seconds}")
    shown += [f"wrote {path}" for path in (artifact, *files)]
    output.result(document, *shown)
