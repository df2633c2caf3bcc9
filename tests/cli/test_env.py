"""``tvmc env``."""

from __future__ import annotations

import rotquant_tvm


def test_the_document_has_everything_that_a_report_needs(tvmc):
    ended = tvmc("env", "--json")
    assert ended.status == 0
    document = ended.document
    assert set(document) == {"versions", "cpu", "gpus", "compilers", "folders", "tuning_logs", "hints"}
    assert document["versions"]["rotquant-tvm"] == rotquant_tvm.__version__
    assert all(set(hint) == {"topic", "text"} and hint["text"] for hint in document["hints"])


def test_what_is_shown_names_versions_and_hints(tvmc, monkeypatch):
    monkeypatch.setattr("rotquant_tvm.environment.gpus", list)
    ended = tvmc("env")
    assert ended.status == 0 and ended.err.startswith("next: tvmc compile")
    assert "apache-tvm" in ended.out and "cores" in ended.out and "none is visible" in ended.out
