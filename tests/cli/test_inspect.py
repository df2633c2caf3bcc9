"""``tvmc inspect`` of a model: one site's dataflow as a picture, and requests that are refused at once."""

from __future__ import annotations


def test_one_sites_dataflow_before_and_after(tvmc, model, tmp_path):
    ended = tvmc("inspect", model, "--site", 1, "--svg", tmp_path / "site.svg", "--json")
    assert ended.status == 0, ended.err
    document = ended.document
    assert document["svg"] == str(tmp_path / "site.svg") and document["refused"] is None
    assert document["near_misses"] == [] and [site["layer"] for site in document["sites"]] == [0, 1]
    assert {site["rotary"]["pairs"] for site in document["sites"]} == {"half-split"}
    assert {(site["k"], site["v"]) for site in document["sites"]} == {("hurwitz3:ip", "hurwitz3")}
    drawn = (tmp_path / "site.svg").read_text()
    labels = ("past_k_1", "nn.attention", "attention_decode", "flush", "plain_1")
    for label in (*labels, "layers_1_self_attn_v_proj · rotated", "layers_1_self_attn_o_proj · rotated"):
        assert f">{label}<" in drawn
    assert "past_k_0" not in drawn


def test_a_site_of_an_artifact_is_refused(tvmc, tmp_path):
    folder = tmp_path / "model.rq"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    ended = tvmc("inspect", folder, "--site", 1)
    assert ended.status == 2 and "is an artifact; name the model" in ended.error and "load TVM" not in ended.err
    assert tvmc("inspect", folder, "--site", "-1").status == 2
    assert tvmc("inspect", folder, "--kv-on-unsupported", "drop").status == 2
