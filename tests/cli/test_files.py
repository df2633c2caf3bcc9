"""Whether something could be written, before the work."""

from __future__ import annotations

import pytest

from rotquant_tvm.cli.files import check_folder
from rotquant_tvm.errors import UsageError


def test_a_folder_that_is_there_or_could_be_is_left_as_it_was(tmp_path):
    for path in (tmp_path, tmp_path / "a" / "b"):
        check_folder(path, "-o")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/logs"])
def test_what_is_no_folder_is_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=f"-o: cannot write into {tmp_path / name}: {tmp_path / 'file'} is no folder"):
        check_folder(tmp_path / name, "-o")


def test_what_the_system_says(tmp_path, monkeypatch):
    def refuse(**_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("rotquant_tvm.cli.files.tempfile.mkdtemp", refuse)
    with pytest.raises(UsageError, match=r"-o: cannot write into .*: Permission denied"):
        check_folder(tmp_path, "-o")
