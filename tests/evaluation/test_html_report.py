"""The HTML report holds every figure and needs nothing from elsewhere."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from rotquant_tvm.evaluation.html_report import html_report

pytest.importorskip("matplotlib")

BITS = {"1024": 4.125, "8192": 3.5625, "32768": 3.51}


def _row(label, kl):
    return {
        "label": label,
        "perplexity": 20.5 + kl,
        "perplexity_change": kl / 20,
        "kl": kl,
        "kl_standard_error": kl / 100,
        "top1_agreement": 0.875,
        "tokens": 16384,
        "seconds": 12.34,
    }


def _document():
    errors = [{"both": 0.1 * i, "k": 0.05 * i, "v": 0.02 * i} for i in range(1, 5)]
    return {
        "model": "<model> & co.gguf",
        "model_digest": "abc",
        "text": "wiki.raw",
        "text_digest": "def",
        "target": "llvm",
        "dtype": "float32",
        "context": 1024,
        "windows": 16,
        "bos": 1,
        "configurations": [
            {"label": "f16", "kv_cache": "f16", "kv_layers": {}, "seed": 0, "bits_per_element": BITS},
            {"label": "rq3", "kv_cache": "hurwitz3,sinks=4", "kv_layers": {"-1": "f16"}, "seed": 0}
            | {"bits_per_element": BITS},
        ],
        "protocols": {"every-token": {"definition": "All <tokens>.", "rows": [_row("f16", 0.0), _row("rq3", 0.162)]}},
        "needle": {
            "definition": "A number.",
            "lengths": [512, 2048],
            "prompts_per_length": 20,
            "rows": [{"label": "rq3", "retrieved": {"512": 0.95, "2048": 0.4}}],
        },
        "layers": {"definition": "Errors.", "rows": [{"label": "rq3", "layers": errors}]},
    }


class _Reader(HTMLParser):
    """Collects the cells, and every address."""

    def __init__(self):
        super().__init__()
        self.cells, self.links, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["td"]:
            self.cells.append(data)


def test_every_figure_is_in_the_report():
    text = html_report(_document())
    reader = _Reader()
    reader.feed(text)
    assert not reader.open
    for cell in ("0.16200", "0.00162", "+0.81 %", "20.662", "87.50 %", "16,384", "3.562", "95 %", "40 %", "3 (0.4000)"):
        assert cell in reader.cells, cell
    assert "hurwitz3,sinks=4" in reader.cells and "-1=f16" in reader.cells
    assert "&lt;model&gt; &amp; co.gguf" in text and "All &lt;tokens&gt;." in text
    assert len(reader.links) == 2 and all(link.startswith("data:image/svg+xml;base64,") for link in reader.links)
    assert b"<svg" in base64.b64decode(reader.links[0].partition(",")[2])
    assert not re.search(r"https?://", text)


def test_sections_without_results_are_left_out():
    document = _document()
    del document["needle"], document["layers"]
    document["protocols"]["every-token"]["rows"] = [_row("f16", 0.0)]
    text = html_report(document)
    assert "haystack" not in text and "by layer" not in text and "nothing to draw" in text
