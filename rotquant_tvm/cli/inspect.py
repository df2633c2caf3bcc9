"""Show the attention sites of a model and what the compiler makes of each, or what is in an artifact.

For example:
  tvmc inspect model.gguf
  tvmc inspect model.gguf --svg sites.svg
  tvmc inspect model.gguf --kv-cache turbo3 --site 3 --svg site3.svg
  tvmc inspect model.rq
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from rotquant_tvm.cli import model_files
from rotquant_tvm.cli.files import check_file, write_whole
from rotquant_tvm.cli.inspect_table import inspected_parts
from rotquant_tvm.cli.options import add_kv_options, integer, kv_cache_config
from rotquant_tvm.cli.output import Output, table
from rotquant_tvm.errors import UsageError

SUMMARY = "show a model's attention sites, or what is in an artifact"
_ARTIFACT_FILES = ("manifest.json", "model.so")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tvmc inspect``."""
    parser.add_argument("model", metavar="MODEL", help="a model, as compile takes it, or an artifact")
    parser.add_argument(
        "--model-format",
        choices=model_files.FORMATS,
        help="refuse MODEL unless it is of this format (default: whatever it is)",
    )
    parser.add_argument(
        "--svg", metavar="FILE", type=Path, help="draw the attention sites of a model (needs the package matplotlib)"
    )
    parser.add_argument(
        "--site",
        metavar="N",
        type=integer(0),
        help="show attention site N alone; with --svg the dataflow around it, before and after the passes",
    )
    add_kv_options(parser, capacity=False)


def execute(arguments: argparse.Namespace, output: Output) -> None:
    """Inspect an artifact if the folder looks like one, else a model."""
    path = Path(arguments.model)
    looks_compiled = any((path / name).is_file() for name in _ARTIFACT_FILES)
    if arguments.svg is not None:
        from rotquant_tvm.cli.site_drawing import require_matplotlib

        require_matplotlib()
        check_file(arguments.svg, "--svg")
    if arguments.site is not None and arguments.svg is None and looks_compiled:
        raise UsageError(f"--site is one of a model's, and {path} is an artifact; name the model")
    if arguments.model_format is None and looks_compiled and not (path / "config.json").is_file():
        if arguments.svg is not None:
            raise UsageError(f"--svg draws the attention sites of a model, and {path} is an artifact; name the model")
        _inspect_artifact(path, output)
    else:
        _inspect_model(arguments, output)


def _inspect_artifact(path: Path, output: Output) -> None:
    with output.steps(1, "check the artifact") as step:
        step("check the artifact")
        from rotquant_tvm.cli.report_table import report_parts, target_text
        from rotquant_tvm.runtime import read_artifact
        from rotquant_tvm.runtime.manifest import TOKENIZER_FILE

        manifest = read_artifact(path).manifest
    report, info = manifest.report, manifest.info
    files = {name: vars(record) for name, record in manifest.files.items()}
    document: dict[str, Any] = {
        "artifact": str(path),
        "target": manifest.target,
        "requires": None if manifest.requires is None else manifest.requires.document(),
        "versions": dict(manifest.versions),
        "model": dict(manifest.model),
        "tuning_records": [dict(record) for record in manifest.tuning_records],
        "codecs": dict(manifest.codecs),
        "default_capacity": manifest.default_capacity,
        "max_position": info.max_position,
        "batch": info.batch,
        "every_logit": info.every_logit,
        "vocab_size": info.vocab_size,
        "tokenizer": TOKENIZER_FILE in files,
        "kv_cache_info": info.document,
        "files": files,
        "report": dict(report),
    }
    shown: list[Table | str] = []
    if "layers_rewritten" in report:
        shown += report_parts(report)
    facts = [
        ["compiled for", target_text(manifest.target)],
        *([] if manifest.requires is None else [["runs on", manifest.requires.text]]),
        ["with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())],
        ["tokens per sequence", f"{manifest.default_capacity or '–'} (at most {info.max_position})"],
        ["batch", str(info.batch or "any")],
        ["logits", "after every token" if info.every_logit else "after the last token"],
        ["vocabulary", str(info.vocab_size)],
        ["chat template", "yes" if manifest.tokenizer.chat_template else "no"],
        *([name, f"{record['bytes']:,} bytes, SHA-256 as in the manifest"] for name, record in files.items()),
    ]
    output.result(document, *shown, table(str(path), ["", ""], facts, left=2))


def _inspect_model(arguments: argparse.Namespace, output: Output) -> None:
    config = kv_cache_config(arguments)
    path = model_files.check_model(arguments.model, arguments.model_format)
    with output.steps(3 if arguments.svg is None else 4, "load TVM") as step:
        step("load TVM")
        from rotquant_tvm.cli.inspected_model import InspectedModel

        step("import")
        inspected = InspectedModel.read(path, config)
        step("find attention")
        document = inspected.describe()
        if arguments.svg is not None:
            step("draw")
            picture = inspected.picture(arguments.site)
            write_whole(arguments.svg, lambda file: file.write(picture), "--svg")
        elif arguments.site is not None:
            inspected.site(arguments.site)
    document["svg"] = None if arguments.svg is None else str(arguments.svg)
    wrote = [] if arguments.svg is None else [f"wrote {arguments.svg}"]
    output.result(document, *inspected_parts(document, arguments.site), *wrote)
    if inspected.refused is not None:
        raise inspected.refused
