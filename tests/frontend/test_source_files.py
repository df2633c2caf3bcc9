"""Which files make a model."""

from __future__ import annotations

from rotquant_tvm.frontend.source_files import source_files


def test_a_folder_is_its_files_and_a_file_itself(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b", "a", "tokenizer.json", "model.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert [file.name for file in source_files(tmp_path)] == ["a", "b", "model.gguf", "tokenizer.json"]
    assert source_files(tmp_path / "model.gguf") == [tmp_path / "model.gguf"]
    assert source_files(tmp_path / "missing") == [tmp_path / "missing"]


def test_a_saved_program_has_its_tokenizer_beside_it(tmp_path):
    program = tmp_path / "model.pt2"
    program.write_bytes(b"no program")
    assert source_files(program) == [program]
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "other.json").write_text("{}")
    assert source_files(program) == [program, tmp_path / "tokenizer.json"]
