"""Measure how good KV caches are on a text: perplexity and KL divergence against the 16-bit cache.

For example:
  tvmc eval model.gguf --text wiki.test.raw --kv-cache rq3 --kv-cache iso3 --kv-cache "hurwitz3,sinks=4,center=64"
  tvmc eval model.gguf --text wiki.test.raw --kv-cache rq3 --protocol every-token --tokens 16384 --json
  tvmc eval model.gguf --text wiki.test.raw --kv-cache rq3 --needle 512,1024,2048 --layers --html report.html

The text goes in windows through the f16 cache and through every --kv-cache. Protocol every-token quantizes every token
before anything attends to it; protocol generation prefills part of each window and feeds the rest token by token.
Results are kept as they come: the same command goes on where it was interrupted. docs/evaluation.md says more.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotquant_tvm.cli import model_files
from rotquant_tvm.cli.files import check_file, write_whole
from rotquant_tvm.cli.options import integer, words
from rotquant_tvm.cli.output import Output, table
from rotquant_tvm.errors import UsageError
from rotquant_tvm.frontend.source_format import EXPECTED

if TYPE_CHECKING:
    from rich.table import Table

SUMMARY = "measure perplexity and KL divergence of KV caches on a text"
PROTOCOLS = ("every-token", "generation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tvmc eval``."""
    parser.add_argument("model", metavar="MODEL", help=EXPECTED)
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="a UTF-8 text, taken as it is")
    parser.add_argument(
        "--kv-cache",
        metavar="K[/V]",
        action="append",
        help="a configuration to measure, as of tvmc compile (may be repeated; default: rq3); f16 always runs beside",
    )
    parser.add_argument("--kv-layers", metavar="LIST", help="formats of single layers, in every --kv-cache")
    parser.add_argument(
        "--protocol",
        metavar="NAME,…",
        type=words(*PROTOCOLS),
        default=list(PROTOCOLS),
        help=f"{' or '.join(PROTOCOLS)} (default: both)",
    )
    parser.add_argument("--tokens", metavar="N", type=integer(1), default=16384, help="of the text (default: 16384)")
    parser.add_argument("--context", metavar="N", type=integer(2), default=1024, help="of a window (default: 1024)")
    parser.add_argument(
        "--prefill", metavar="N", type=integer(1), help="of generation, before its first step (default: half a window)"
    )
    parser.add_argument("--batch", metavar="N", type=integer(1), default=8, help="windows at a time (default: 8)")
    further = parser.add_argument_group("further measurements")
    further.add_argument(
        "--needle", metavar="N,…", type=_lengths, default=[], help="retrieve a number hidden in texts of N tokens"
    )
    further.add_argument(
        "--needle-trials", metavar="N", type=integer(1), default=4, help="numbers per depth and length (default: 4)"
    )
    further.add_argument("--layers", action="store_true", help="error of every layer's attention; needs torch")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a report with pictures; needs matplotlib")
    parser.add_argument("--target", default="llvm", help="llvm (this CPU) or cuda (this GPU) (default: llvm)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: float32"
    )
    parser.add_argument(
        "--resume", metavar="DIR", type=Path, help="where results are kept (default: the user's cache folder)"
    )


def execute(arguments: argparse.Namespace, output: Output) -> None:
    """Evaluate; every cheap check comes before torch and TVM are loaded."""
    from rotquant_tvm.kv_cache_config import KVCacheConfig

    texts = arguments.kv_cache or ["rq3"]
    for text in texts:
        KVCacheConfig.parse(text, arguments.kv_layers)
    prefill = _check_lengths(arguments)
    if arguments.html is not None:
        from rotquant_tvm.evaluation.plots import require_matplotlib

        require_matplotlib()
        check_file(arguments.html, "--html")
    model = model_files.check_model(arguments.model, None)
    with output.steps(None, "load TVM") as step:
        step("load TVM")
        from rotquant_tvm.evaluation.evaluation import Evaluation, Settings
        from rotquant_tvm.evaluation.libraries import Candidate

        given = [Candidate.parse(text, arguments.kv_layers) for text in texts]
        settings = Settings(
            model,
            arguments.text,
            tuple(given),
            tokens=arguments.tokens,
            context=arguments.context,
            prefill=prefill,
            batch=arguments.batch,
            protocols=tuple(arguments.protocol),
            needle=tuple(arguments.needle),
            needle_trials=arguments.needle_trials,
            layers=arguments.layers,
            target=arguments.target,
            dtype=arguments.dtype,
            results=arguments.resume,
        )
        document = Evaluation(settings, step).document()
    if arguments.html is not None:
        from rotquant_tvm.evaluation.html_report import html_report

        write_whole(arguments.html, lambda file: file.write(html_report(document).encode()), "--html")
        document["html"] = str(arguments.html)
    output.result(document, *_shown(document))


def _lengths(text: str) -> list[int]:
    return [integer(1)(word) for word in words()(text)]


def _check_lengths(arguments: argparse.Namespace) -> int:
    """Return the length of the prefill; raises UsageError if the lengths do not fit each other."""
    prefill = int(arguments.context // 2 if arguments.prefill is None else arguments.prefill)
    if arguments.tokens < arguments.context:
        raise UsageError(
            f"--tokens {arguments.tokens} is less than one window of --context {arguments.context}; raise it"
        )
    if "generation" in arguments.protocol and not 1 <= prefill <= arguments.context - 2:
        raise UsageError(
            f"--prefill {prefill} leaves nothing to score of a window of {arguments.context}; "
            "it must be at least 2 tokens shorter"
        )
    return prefill


def _shown(document: dict[str, Any]) -> list[Table | str]:
    bits = {entry["label"]: entry["bits_per_element"] for entry in document["configurations"]}
    lengths = next(iter(bits.values()))
    columns = ["KV cache", *(f"bits/el.\nat {int(n) // 1024}K" for n in lengths), "perplexity", "against f16"]
    columns += ["KL to f16\n(nats)", "± s.e.", "same top\ntoken", "tokens", "seconds"]
    shown: list[Table | str] = []
    for name, protocol in document["protocols"].items():
        rows = [_row(row, bits[row["label"]]) for row in protocol["rows"]]
        shown += [f"{name}: {protocol['definition']}", table("", columns, rows), ""]
    if "needle" in document:
        shown += [f"needle: {document['needle']['definition']}", _needle_table(document["needle"]), ""]
    if "layers" in document:
        shown += [f"layers: {document['layers']['definition']}", _layers_table(document["layers"]), ""]
    window = f"{document['windows']} windows of {document['context']} tokens"
    opened = f", each opened by token {document['bos']} (BOS)" if document["bos"] is not None else ""
    shown.append(f"{window}{opened}; results kept in {document['results']}")
    return shown + ([f"wrote {document['html']}"] if "html" in document else [])


def _needle_table(needle: dict[str, Any]) -> Table:
    lengths = [str(length) for length in needle["lengths"]]
    rows = [[row["label"], *(f"{100 * row['retrieved'][n]:.0f} %" for n in lengths)] for row in needle["rows"]]
    return table("", ["KV cache", *(f"{n} tokens" for n in lengths)], rows)


def _layers_table(layers: dict[str, Any]) -> Table:
    """One row per layer, one column per configuration: the error of K and V together."""
    columns = ["layer", *(row["label"] for row in layers["rows"])]
    errors = [[f"{error['both']:.4f}" for error in row["layers"]] for row in layers["rows"]]
    return table("", columns, [[str(index), *row] for index, row in enumerate(zip(*errors, strict=True))])


def _row(row: dict[str, Any], bits: dict[str, float]) -> list[object]:
    from rotquant_tvm.evaluation.figures import figure_cells

    return [row["label"], *(f"{value:.3f}" for value in bits.values()), *figure_cells(row)]
