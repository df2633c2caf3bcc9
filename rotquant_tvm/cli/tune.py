"""Tune the kernels of a model for one device, and keep what is best as a tuning log.

For example:
  tvmc tune model.gguf --kv-cache rq3 --target cuda
  tvmc tune model.gguf --kv-cache rq3 --target cuda --time-budget 600
  tvmc tune --target cuda --heads 32 --kv-heads 8 --head-dim 128 -o logs
  tvmc tune --target cuda --shapes 1x8K,8x32K --tasks attention_decode --trials-per-task 32
  tvmc tune model.gguf --target cuda --tasks list

With MODEL, its KV operators and the rest of its work (linear layers, norms, loops) are tuned; of a transformers model
config.json is enough. Without, an attention of --heads and so on is, in 2, 3 and 4 bits and with the preset rq3, or in
--kv-cache. A run that was interrupted or out of time goes on where it was: the same command measures nothing twice.
tvmc compile finds the log by itself unless -o named a folder of your own; then tell it with --tuning-records.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotquant_tvm.benchmark.settings import BatchShape
from rotquant_tvm.cli import model_files, tune_checks
from rotquant_tvm.cli.options import add_kv_options, integer, kv_cache_config, number, words
from rotquant_tvm.cli.output import Advance, Output, table
from rotquant_tvm.cli.tune_progress import tuning_progress
from rotquant_tvm.errors import ModelError, UsageError
from rotquant_tvm.frontend.source_format import EXPECTED

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.target import Target

    from rotquant_tvm import KVCacheConfig
    from rotquant_tvm.tuning.remote_measuring import RemoteDevice
    from rotquant_tvm.tuning.tune import TuningOptions, TuningResult
    from rotquant_tvm.tuning.tuning_task import TuningTask

SUMMARY = "tune the kernels of a model for one device"
_KV_OPTIONS = ("kv_cache", "cache_type_k", "cache_type_v", "kv_layers", *(f"kv_{n}" for n in ("sinks", "recent")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tvmc tune``."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help=EXPECTED)
    parser.add_argument(
        "--model-format",
        choices=model_files.FORMATS,
        help="refuse MODEL unless it is of this format (default: whatever it is)",
    )
    parser.add_argument(
        "--target",
        default="llvm",
        help="llvm (this CPU), cuda (this GPU), a TVM target with options, a tag, or a file with one",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="default: float32; without MODEL float16 on cuda",
    )
    parser.add_argument(
        *("-o", "--output", "--tuning-records"),
        metavar="DIR",
        type=Path,
        help="folder of log folders, to go on with and to write to (default: the user's data folder)",
    )
    shapes = parser.add_argument_group("shapes")
    shapes.add_argument("--heads", metavar="N", type=integer(1), help="without MODEL: query heads (default: 32)")
    shapes.add_argument("--kv-heads", metavar="N", type=integer(1), help="without MODEL: heads of K and V (default: 8)")
    shapes.add_argument("--head-dim", metavar="N", type=integer(16), help="without MODEL: their size (default: 128)")
    shapes.add_argument(
        "--shapes", metavar="BxN,…", type=_shapes, default=[], help="sequences x tokens of each, like 1x8K,8x32K"
    )
    shapes.add_argument(
        "--vectors", metavar="FORMAT,…", type=words(), default=[], help="codecs of plain vectors in these formats too"
    )
    _add_search_options(parser)
    add_kv_options(parser)


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    search = parser.add_argument_group("search")
    search.add_argument(
        "--tasks",
        metavar="WHICH",
        default="all",
        help="list, all, numbers like 0,2-4, or parts of names (default: all)",
    )
    search.add_argument("--trials", metavar="N", type=integer(1), help="kernels measured in all (default: no limit)")
    search.add_argument(
        "--trials-per-task", metavar="N", type=integer(1), default=16, help="kernels measured per task (default: 16)"
    )
    search.add_argument(
        "--time-budget",
        metavar="S",
        type=number(0, above=True),
        help="seconds for all kernels, from the first on (default: no limit)",
    )
    search.add_argument(
        "--early-stopping", metavar="N", type=integer(0), default=0, help="end a task after N without a new best"
    )
    search.add_argument("--seed", metavar="N", type=integer(0), default=0, help="of the order of trials (default: 0)")
    search.add_argument("--parallel", metavar="N", type=integer(1), help="compiling processes (default: one per core)")
    search.add_argument(
        "--timeout", metavar="S", type=number(0, above=True), default=60.0, help="seconds for a kernel (default: 60)"
    )
    measure = parser.add_argument_group("measurement")
    measure.add_argument("--number", metavar="N", type=integer(1), default=10, help="runs, at least (default: 10)")
    measure.add_argument("--repeat", metavar="N", type=integer(1), default=5, help="measurements (default: 5)")
    measure.add_argument(
        "--min-repeat-ms", metavar="MS", type=number(0), default=5.0, help="of one measurement (default: 5)"
    )
    measure.add_argument("--rpc-tracker", metavar="HOST:PORT", help="measure on a device that TVM's RPC tracker has")
    measure.add_argument("--rpc-key", metavar="KEY", help="the key of that device's server")


def execute(arguments: argparse.Namespace, output: Output) -> None:
    """Tune; every cheap check comes before torch and TVM are loaded, every other one before the model is."""
    configs = _configs(arguments)
    tune_checks.check_words(arguments)
    model = None if arguments.model is None else model_files.check_model(arguments.model, arguments.model_format)
    with output.steps(None, "load TVM") as step:
        step("load TVM")
        from rotquant_tvm.target import resolve_target

        target = resolve_target(arguments.target)
        tune_checks.check_operators(arguments, target)
        remote = tune_checks.device_to_measure_on(arguments, target)
        tasks = _tasks(arguments, model, configs, target, step)
    if arguments.tasks == "list":
        output.result({"tasks": [_described(task) for task in tasks]}, _task_table(tasks))
        return
    from rotquant_tvm.tuning.log_folders import user_logs
    from rotquant_tvm.tuning.task_selection import TaskSelection
    from rotquant_tvm.tuning.tune import tune

    tasks = TaskSelection.parse(arguments.tasks).of(tasks)
    options = _options(arguments, remote)
    root = (arguments.output or user_logs()).resolve()
    try:
        with tuning_progress(output, f"start the workers for {len(tasks)} tasks") as told:
            result = tune(tasks, root, options, told)
    except (KeyboardInterrupt, SystemExit):
        output.note(f"what was measured is kept in {root}; to go on: {_this_command()}")
        raise
    for failure in result.failures:
        output.detail(failure)
    _show(result, output)
    if not result.finished:
        late = not result.measured and arguments.time_budget is not None
        none = f"nothing was measured in {arguments.time_budget:g} s, give it longer; " if late else ""
        output.note(f"{none}there are trials left; to go on: {_this_command()}")


def _this_command() -> str:
    return shlex.join(["tvmc", *sys.argv[1:]])


def _configs(arguments: argparse.Namespace) -> list[KVCacheConfig]:
    from rotquant_tvm.kv_cache_config import KVCacheConfig

    given = any(getattr(arguments, name) is not None for name in (*_KV_OPTIONS, "kv_center", "kv_defer"))
    if arguments.model is None and not given:
        from rotquant_tvm.tuning.default_caches import DEFAULT_CACHES

        return [KVCacheConfig.parse(text) for text in DEFAULT_CACHES]
    if arguments.model is not None:
        for name in ("heads", "kv_heads", "head_dim"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} is for tuning without MODEL, which has heads of its own")
    return [kv_cache_config(arguments)]


def _tasks(
    arguments: argparse.Namespace, model: Path | None, configs: list[KVCacheConfig], target: Target, step: Advance
) -> list[TuningTask]:
    from rotquant_tvm.tuning.bare_model import AttentionHeads, bare_model
    from rotquant_tvm.tuning.task_sources import model_definitions, pass_definitions, vector_definitions
    from rotquant_tvm.tuning.tuning_task import tuning_tasks

    dtype = arguments.dtype or ("float16" if model is None and target.kind.name == "cuda" else "float32")
    heads = {name: getattr(arguments, name) for name in ("heads", "kv_heads", "head_dim")}
    attention = AttentionHeads(**{name: value for name, value in heads.items() if value is not None}, dtype=dtype)
    if model is None:
        mod = bare_model(attention)
    else:
        step("import")
        mod = _imported(model, dtype)
    step("find the kernels")
    found = pass_definitions if model is None else model_definitions
    definitions = [func for config in configs for func in found(mod, config, target)]
    if arguments.vectors:
        definitions += vector_definitions(arguments.vectors, attention.head_dim, dtype, target)
    return tuning_tasks(definitions, target, arguments.shapes)


def _imported(model: Path, dtype: str) -> IRModule:
    """The module of a model; of a directory without weights by its configuration, since their shapes are enough."""
    from rotquant_tvm.frontend import from_config, import_model, require_torch

    if not model.is_dir() or any(next(model.glob(f"*.{suffix}"), None) for suffix in ("safetensors", "bin")):
        return import_model(model, dtype=dtype).mod
    require_torch()
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{model} has no configuration that transformers can read: {reason}") from error
    return from_config(config, dtype=dtype).mod


def _options(arguments: argparse.Namespace, remote: RemoteDevice | None) -> TuningOptions:
    from rotquant_tvm.tuning.kernel_timer import Timing
    from rotquant_tvm.tuning.tune import TuningOptions

    parallel = {} if arguments.parallel is None else {"parallel": arguments.parallel}
    return TuningOptions(
        trials_per_task=arguments.trials_per_task,
        trials=arguments.trials,
        time_budget=arguments.time_budget,
        early_stopping=arguments.early_stopping,
        timing=Timing(arguments.number, arguments.repeat, arguments.min_repeat_ms),
        timeout=arguments.timeout,
        remote=remote,
        seed=arguments.seed,
        **parallel,
    )


def _shapes(text: str) -> list[BatchShape]:
    try:
        return [BatchShape.parse(word) for word in words()(text)]
    except UsageError as error:  # argparse would hide its text: it is a ValueError
        raise argparse.ArgumentTypeError(str(error)) from error


def _described(task: TuningTask) -> dict[str, Any]:
    return {
        "name": task.name,
        "operator": task.shape.operator,
        "rule": task.rule,
        "kernel_hash": task.kernel_hash,
        "properties": dict(task.shape.properties),
        "bucket": task.bucket,
        "knobs": {name: list(values) for name, values in task.knobs.items()},
    }


def _task_table(tasks: list[TuningTask]) -> Any:
    rows = [
        [str(index), task.name, task.rule, ", ".join(f"{name}: {len(v)}" for name, v in task.knobs.items())]
        for index, task in enumerate(tasks)
    ]
    return table("tasks", ["task", "kernel and shape", "rule", "knobs and how many values"], rows, left=4)


def _show(result: TuningResult, output: Output) -> None:
    from rotquant_tvm.cli.log_table import record_table

    records = list(result.records)
    document = {
        "folder": str(result.folder),
        "device": result.device.document(),
        "measured": result.measured,
        "failures": list(result.failures),
        "finished": result.finished,
        "records": [vars(record) | {"gain": record.gain} for record in records],
    }
    failed = f", {len(result.failures)} failed" if result.failures else ""
    output.result(
        document,
        record_table(result.device.name, records),
        f"measured {result.measured} kernels{failed}; "
        + (f"wrote {len(records)} records to {result.folder}" if records else "no record was written"),
    )
