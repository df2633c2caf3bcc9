"""The command line on programs that torch saved."""

from __future__ import annotations

import pytest
import torch

from ..frontend.torch_program_cases import exported


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "step.pt2"
    torch.export.save(exported("buffers"), path)
    return path


def test_inspect_finds_its_attention(tvmc, program):
    ended = tvmc("inspect", program, "--model-format", "pt2", "--json")
    assert ended.status == 0, ended.err
    found = [[site[name] for name in ("heads", "kv_heads", "head_dim", "mask")] for site in ended.document["sites"]]
    assert found == [[4, 2, 32, "causal"]] * 2


def test_damaged_files_and_other_formats_are_refused_in_one_line(tvmc, program, tmp_path):
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(program.read_bytes()[:5000])
    ended = tvmc("inspect", cut)
    assert ended.status == 4 and "damaged or cut short" in ended.error
    ended = tvmc("compile", program, "--model-format", "gguf", "-o", tmp_path / "x.rq")
    assert ended.status == 4 and "is not of the format 'gguf' but 'pt2'" in ended.error


@pytest.mark.full
def test_it_compiles_to_an_artifact(tvmc, program, tmp_path):
    ended = tvmc("compile", program, "--kv-cache", "hurwitz3", "-o", tmp_path / "step.rq", "--json")
    assert ended.status == 0, ended.err
    assert ended.document["layers_rewritten"] == 2
    assert tvmc("inspect", tmp_path / "step.rq", "--json").document["vocab_size"] == 97
