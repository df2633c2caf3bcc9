"""The kind of a model, told from its first bytes."""

from __future__ import annotations

import pytest

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.source_format import source_format

ONNX = bytes([0x08, 0x0A, 0x12, 0x07]) + b"pytorch"


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("model.gguf", b"GGUF\x03", "gguf"),
        ("weights", b"GGUF\x03", "gguf"),
        ("model.onnx", b"", "onnx"),
        ("step.bin", ONNX, "onnx"),
        ("model.onnx", b"GGUF\x03", "gguf"),
        ("model.GGUF", b"", "gguf"),
    ],
)
def test_content_comes_before_the_suffix(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    assert source_format(tmp_path / name) == found


def test_directories_and_what_is_no_model(tmp_path):
    assert source_format(tmp_path) == "hf"
    (tmp_path / "notes.txt").write_text("\x08hello")
    with pytest.raises(ModelError, match=r"notes.txt is not a model; give a directory with config.json"):
        source_format(tmp_path / "notes.txt")
    with pytest.raises(ModelError, match="does not exist"):
        source_format(tmp_path / "none.onnx")
