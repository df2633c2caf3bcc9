"""Time the kernels against what the memory allows, and against other libraries, in one run.

For example:
  tvmc bench decode --kv-cache rq3 --kv-cache hurwitz3 --shapes 1x32K,8x32K --plot decode.svg
  tvmc bench roundtrip --peers ~/checkouts --json
  tvmc bench decode --target llvm --shapes 1x4K
  tvmc bench e2e --kv-cache rq3 --shapes 1x32K

roundtrip: vectors through their format and back. append: new tokens into a cache. decode: attention of one token per
sequence, against cuDNN, FlashAttention and our own f16 cache. prefill: causal attention of a chunk. e2e: a whole model.
On CUDA a figure is the median of graph replays whose buffers rotate past the device's cache; the floor is the bytes
over the bandwidth of a copy or of a kernel that only reads, measured in the same run. On CUDA it needs torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotquant_tvm.benchmark.settings import KV_CACHES, OPERATIONS, SHAPES, BatchShape, Settings
from rotquant_tvm.cli.files import check_file, write_whole
from rotquant_tvm.cli.options import integer, words
from rotquant_tvm.cli.output import Advance, Output
from rotquant_tvm.errors import UsageError

if TYPE_CHECKING:
    from rotquant_tvm.benchmark.report import Report

SUMMARY = "time the kernels against the memory's floor and other libraries"

_CACHES = ("append", "decode", "prefill", "e2e")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "kv_cache": _CACHES,
    "shapes": _CACHES,
    "heads": ("append", "decode", "prefill"),
    "kv_heads": ("append", "decode", "prefill"),
    "head_dim": ("append", "decode", "prefill"),
    "dtype": _CACHES,
    "vectors": ("roundtrip",),
    "head_dims": ("roundtrip",),
    "bits": ("roundtrip",),
    "rotations": ("roundtrip",),
    "dtypes": ("roundtrip",),
    "peers": ("roundtrip",),
    "warm": ("roundtrip", "decode"),
}
"""Which operations an option is for; all of them are None unless they are given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tvmc bench``."""
    parser.add_argument("operation", choices=OPERATIONS, help="what to measure")
    parser.add_argument("--target", default="cuda", help="cuda (this GPU) or llvm (this CPU) (default: cuda)")
    parser.add_argument(
        "--samples", metavar="N", type=integer(1), default=20, help="timings that a median is of (default: 20)"
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        default=None,
        help="roundtrip, decode: the same buffers again and again, so that the device's cache keeps them",
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write the roofline picture: .svg, .png or .pdf")
    caches = parser.add_argument_group("append, decode, prefill, e2e")
    caches.add_argument(
        "--kv-cache",
        metavar="K[/V]",
        action="append",
        help="a configuration to measure, as of tvmc compile (may be repeated); f16 runs beside",
    )
    caches.add_argument("--shapes", metavar="BxN,…", type=_shapes, help="sequences x tokens of each, like 1x8K,32x8K")
    caches.add_argument("--heads", metavar="N", type=integer(1), help="query heads (default: 32; not of e2e)")
    caches.add_argument("--kv-heads", metavar="N", type=integer(1), help="heads of K and V (default: 8; not of e2e)")
    caches.add_argument("--head-dim", metavar="N", type=integer(16), help="default: 128 (not of e2e)")
    caches.add_argument(
        "--dtype", choices=("float16", "float32"), help="of queries, keys, values (default: float16; float32 on llvm)"
    )
    vectors = parser.add_argument_group("roundtrip")
    vectors.add_argument("--vectors", metavar="N,…", type=_numbers, help="how many (default: 8,192, and 1M of 128)")
    vectors.add_argument("--head-dims", metavar="N,…", type=_numbers, help="default: 128,256,512")
    vectors.add_argument("--bits", metavar="N,…", type=_numbers, help="default: 2,3,4")
    vectors.add_argument("--rotations", metavar="NAME,…", type=words(), help="default: iso-full,iso")
    vectors.add_argument(
        "--dtypes", metavar="NAME,…", type=words("float16", "float32"), help="default: float16,float32"
    )
    vectors.add_argument(
        "--peers",
        metavar="DIR",
        type=Path,
        help="race the CUDA kernels of your checkouts of ParaMind2025/isoquant and scrya-com/rotorquant in DIR",
    )


def execute(arguments: argparse.Namespace, output: Output) -> None:
    """Measure; every cheap check comes before TVM and torch are loaded. Ends with status 1 if a check failed."""
    settings = _settings(arguments)
    if arguments.plot is not None:
        from rotquant_tvm.benchmark.plots import check_plot

        check_plot(arguments.plot)
        check_file(arguments.plot, "--plot")
    with output.steps(None, "load TVM") as step:
        report = _run(settings, step)
    document = report.document()
    if arguments.plot is not None:
        from rotquant_tvm.benchmark.plots import draw_roofline

        write_whole(arguments.plot, lambda file: draw_roofline(report, file, arguments.plot.suffix), "--plot")
        document["plot"] = str(arguments.plot)
    from rotquant_tvm.cli.bench_table import shown

    output.result(document, *shown(report), *([f"wrote {arguments.plot}"] if arguments.plot else []))
    if not report.passed:
        raise SystemExit(1)


def _run(settings: Settings, step: Advance) -> Report:
    import importlib
    from dataclasses import replace

    module = importlib.import_module(f"rotquant_tvm.benchmark.{settings.operation}")
    report: Report = module.run(replace(settings, progress=step))
    return report


def _settings(arguments: argparse.Namespace) -> Settings:
    """Read and check the options; raises ``UsageError`` or ``FormatError``."""
    from rotquant_tvm.kv_cache_config import KVCacheConfig

    operation = arguments.operation
    given: dict[str, Any] = {}
    for name, operations in _OPTIONS.items():
        value = getattr(arguments, name)
        if value is None:
            continue
        if operation not in operations:
            raise UsageError(f"--{name.replace('_', '-')} is not for {operation}; it is for {', '.join(operations)}")
        given[name] = tuple(value) if isinstance(value, list) else value
    kind = "llvm" if arguments.target.strip().startswith("llvm") else "cuda"
    options: dict[str, Any] = {"dtype": "float32" if kind == "llvm" else "float16", "target": arguments.target}
    options["samples"] = arguments.samples
    if operation != "roundtrip":
        caches = given.pop("kv_cache", KV_CACHES[operation])
        for text in caches:
            KVCacheConfig.parse(text).codecs(0, 1, given.get("head_dim", Settings.head_dim))
        options |= {"kv_caches": tuple(dict.fromkeys(caches)), "shapes": SHAPES[operation, kind]}
    if "peers" in given and not given["peers"].is_dir():
        raise UsageError(f"--peers {given['peers']}: there is no such folder; clone the other projects into one")
    return Settings(operation, **(options | given))


def _shapes(text: str) -> list[BatchShape]:
    try:
        return [BatchShape.parse(word) for word in words()(text)]
    except UsageError as error:  # argparse would hide its text: it is a ValueError
        raise argparse.ArgumentTypeError(str(error)) from error


def _numbers(text: str) -> list[int]:
    try:
        return [BatchShape.parse(f"1x{word}").tokens for word in words()(text)]
    except UsageError:
        raise argparse.ArgumentTypeError(f"cannot read the numbers '{text}'; write them like 8192,1M") from None
