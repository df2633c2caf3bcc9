"""The report of an evaluation as one HTML file that needs nothing else: tables, pictures, definitions."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rotquant_tvm.evaluation.figures import figure_cells
from rotquant_tvm.evaluation.plots import draw_layers, draw_pareto, summary_points

BITS_AT = 8192
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } p.note { color: #555; }
"""


def html_report(document: Mapping[str, Any]) -> str:
    """Return the HTML of what ``Evaluation.document()`` returned; pictures are embedded. Needs matplotlib."""
    lengths = list(document["configurations"][0]["bits_per_element"])
    bits = {entry["label"]: entry["bits_per_element"] for entry in document["configurations"]}
    parts = [f"<h1>KV caches of {escape(document['model'])}</h1>", _facts(document)]
    for name, protocol in document["protocols"].items():
        parts += [f"<h2>Protocol {escape(name)}</h2>", _note(protocol["definition"])]
        parts.append(_scores_table(protocol, bits, lengths))
        at_length = {label: values[str(BITS_AT)] for label, values in bits.items()}
        picture = draw_pareto(summary_points(protocol, at_length), BITS_AT)
        parts.append(_image(picture, f"KL divergence against true bits per element, protocol {name}"))
    if "needle" in document:
        parts += ["<h2>Needle in a haystack</h2>", _note(document["needle"]["definition"])]
        parts.append(_needle_table(document["needle"]))
    if "layers" in document:
        layers = document["layers"]
        parts += ["<h2>Attention error by layer</h2>", _note(layers["definition"])]
        parts.append(_image(draw_layers({row["label"]: row["layers"] for row in layers["rows"]}), "error by layer"))
        parts.append(_layers_table(layers))
    parts += ["<h2>Configurations</h2>", _configurations_table(document["configurations"])]
    title = f"KV caches of {document['model']}"
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _facts(document: Mapping[str, Any]) -> str:
    opened = "" if document["bos"] is None else f", each opened by token {document['bos']} (BOS)"
    facts = {
        "text": f"{document['text']} (SHA-256 {document['text_digest']})",
        "model's SHA-256": document["model_digest"],
        "windows": f"{document['windows']} of {document['context']} tokens{opened}",
        "target": f"{document['target']}, {document['dtype']}",
    }
    return "".join(_note(f"{name}: {value}") for name, value in facts.items())


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _image(svg: bytes | None, text: str) -> str:
    if svg is None:
        return _note("Nothing differs from the f16 cache, so there is nothing to draw.")
    return f'<img alt="{escape(text)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _scores_table(protocol: Mapping[str, Any], bits: Mapping[str, Any], lengths: Sequence[str]) -> str:
    columns = ["KV cache", *(f"bits at {int(n) // 1024}K" for n in lengths)]
    columns += ["perplexity", "against f16", "KL (nats)", "± s.e.", "same top token", "tokens", "seconds"]
    rows = [
        [row["label"], *(f"{bits[row['label']][n]:.3f}" for n in lengths), *figure_cells(row)]
        for row in protocol["rows"]
    ]
    return _table(columns, rows)


def _needle_table(needle: Mapping[str, Any]) -> str:
    lengths = [str(length) for length in needle["lengths"]]
    rows = [[row["label"], *(f"{100 * row['retrieved'][n]:.0f} %" for n in lengths)] for row in needle["rows"]]
    return _table(["retrieved", *(f"{int(n):,} tokens" for n in lengths)], rows) + _note(
        f"{needle['prompts_per_length']} prompts per length."
    )


def _layers_table(layers: Mapping[str, Any]) -> str:
    """Return the mean over layers, and the worst layer."""
    rows = []
    for row in layers["rows"]:
        errors = row["layers"]
        means = [sum(error[part] for error in errors) / len(errors) for part in ("both", "k", "v")]
        worst = max(range(len(errors)), key=lambda index: errors[index]["both"])
        rows.append([row["label"], *(f"{mean:.4f}" for mean in means), f"{worst} ({errors[worst]['both']:.4f})"])
    return _table(["mean over layers", "K and V", "K only", "V only", "worst layer"], rows)


def _configurations_table(configurations: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for entry in configurations:
        layers = "; ".join(f"{index}={name}" for index, name in entry["kv_layers"].items())
        rows.append([entry["label"], entry["kv_cache"], layers, str(entry["seed"])])
    return _table(["as given", "in full", "other layers", "seed"], rows)
