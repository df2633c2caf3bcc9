"""Results survive the process, also one that was killed while it wrote."""

from __future__ import annotations

import pytest

from rotquant_tvm.errors import UsageError
from rotquant_tvm.evaluation.result_store import FILE, ResultStore


def test_values_come_back_in_another_process(tmp_path):
    store = ResultStore(tmp_path / "new" / "folder")
    assert store.get({"a": 1}) is None
    store.put({"a": 1, "b": {"x": [2]}}, {"kl": 0.1})
    store.put({"a": 2}, "text\nof two lines")
    store.put({"a": 2}, "later")
    for each in (store, ResultStore(tmp_path / "new" / "folder")):
        assert each.get({"b": {"x": [2]}, "a": 1}) == {"kl": 0.1}
        assert each.get({"a": 2}) == "later" and each.get({"a": 1}) is None


def test_a_line_cut_short_is_ignored_and_not_joined_to(tmp_path):
    store = ResultStore(tmp_path)
    store.put({"a": 1}, 1)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes() + b'{"key":{"a":2},"val')
    again = ResultStore(tmp_path)
    assert again.get({"a": 1}) == 1 and again.get({"a": 2}) is None
    again.put({"a": 3}, 3)
    path.write_bytes(path.read_bytes() + b"\xff\n[1]\n")
    last = ResultStore(tmp_path)
    assert (last.get({"a": 1}), last.get({"a": 3})) == (1, 3)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot keep results"):
        ResultStore(tmp_path / "file")
