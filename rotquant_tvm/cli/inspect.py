"""Show the attention sites of a model and what the compiler makes of each, or what is in an artifact.

For example:
  tvmc inspect model.gguf
  tvmc inspect model.gguf --svg sites.svg
  tvmc inspect model.rq
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rotquant_tvm.cli import model_files
from rotquant_tvm.cli.files import check_file, write_whole
from rotquant_tvm.cli.output import Output, table
from rotquant_tvm.errors import UsageError

if TYPE_CHECKING:
    from rotquant_tvm.frontend import ImportedModel
    from rotquant_tvm.passes.find_attention import AttentionSite

SUMMARY = "show a model's attention sites, or what is in an artifact"
_ARTIFACT_FILES = ("manifest.json", "model.so")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tvmc inspect``."""
    parser.add_argument("model", metavar="MODEL", help="a transformers model directory, a .gguf file or an artifact")
    parser.add_argument(
        "--model-format",
        choices=model_files.FORMATS,
        help="refuse MODEL unless it is of this format (default: whatever it is)",
    )
    parser.add_argument(
        "--svg", metavar="FILE", type=Path, help="draw the attention sites of a model (needs the package matplotlib)"
    )


def execute(arguments: argparse.Namespace, output: Output) -> None:
    """Inspect an artifact if the folder looks like one, else a model."""
    path = Path(arguments.model)
    looks_compiled = any((path / name).is_file() for name in _ARTIFACT_FILES)
    if arguments.svg is not None:
        from rotquant_tvm.cli.site_drawing import require_matplotlib

        require_matplotlib()
        check_file(arguments.svg, "--svg")
    if arguments.model_format is None and looks_compiled and not (path / "config.json").is_file():
        if arguments.svg is not None:
            raise UsageError(f"--svg draws the attention sites of a model, and {path} is an artifact; name the model")
        _inspect_artifact(path, output)
    else:
        _inspect_model(model_files.check_model(arguments.model, arguments.model_format), arguments.svg, output)


def _inspect_artifact(path: Path, output: Output) -> None:
    with output.steps(1, "check the artifact") as step:
        step("check the artifact")
        from rotquant_tvm.cli.report_table import report_parts, target_text
        from rotquant_tvm.runtime import read_artifact

        manifest = read_artifact(path).manifest
    report, info = manifest.report, manifest.info
    files = {name: vars(record) for name, record in manifest.files.items()}
    document: dict[str, Any] = {
        "artifact": str(path),
        "target": manifest.target,
        "tvm": manifest.tvm,
        "default_capacity": manifest.default_capacity,
        "max_position": info.max_position,
        "batch": info.batch,
        "vocab_size": info.vocab_size,
        "kv_cache_info": info.document,
        "files": files,
        "report": dict(report),
    }
    shown: list[Table | str] = []
    if "layers_rewritten" in report:
        shown += report_parts(report)
    facts = [
        ["compiled for", target_text(manifest.target)],
        ["with TVM", manifest.tvm],
        ["tokens per sequence", f"{manifest.default_capacity or '–'} (at most {info.max_position})"],
        ["batch", str(info.batch or "any")],
        ["vocabulary", str(info.vocab_size)],
        ["chat template", "yes" if manifest.tokenizer.chat_template else "no"],
        *([name, f"{record['bytes']:,} bytes, SHA-256 as in the manifest"] for name, record in files.items()),
    ]
    output.result(document, *shown, table(str(path), ["", ""], facts, left=2))


def _inspect_model(path: Path, svg: Path | None, output: Output) -> None:
    with output.steps(3 if svg is None else 4, "load TVM") as step:
        step("load TVM")
        from rotquant_tvm.frontend import import_model
        from rotquant_tvm.passes.find_attention import find_attention

        step("import")
        imported = import_model(path)
        step("find attention")
        found = find_attention(imported.mod["main"])
        if svg is not None:
            step("draw")
            _draw(path, imported, found, svg)
    sites = [site.describe() for site in found]
    config = imported.config
    document = {
        "model": str(path),
        "model_type": config["model_type"],
        "vocab_size": config["vocab_size"],
        "max_position": config["max_position"],
        "weights": len(imported.weights),
        "tokenizer": imported.tokenizer is not None,
        "sites": sites,
        "svg": None if svg is None else str(svg),
    }
    rows = [
        [
            site["index"],
            site["verdict"] + (f": {site['reason']}" if site["reason"] else ""),
            site["mask"] + (f" {site['window']}" if site["window"] else ""),
            site["heads"],
            site["kv_heads"],
            site["head_dim"],
            site["scale"],
        ]
        for site in sites
    ]
    columns = ["site", "verdict", "mask", "heads", "kv heads", "head dim", "scale"]
    count = sum(site["verdict"] == "quantize" for site in sites)
    output.result(
        document,
        table("attention", columns, rows, left=3),
        f"{config['model_type']}: {count} of {len(sites)} attention sites can have a packed KV cache",
        *([] if svg is None else [f"wrote {svg}"]),
    )


def _draw(path: Path, imported: ImportedModel, sites: list[AttentionSite], svg: Path) -> None:
    from rotquant_tvm.cli.site_drawing import draw_sites
    from rotquant_tvm.cli.site_graph import site_graph

    title = f"attention sites of {path.name} ({imported.config['model_type']})"
    picture = draw_sites(site_graph(imported, sites), title)
    write_whole(svg, lambda file: file.write(picture), "--svg")
