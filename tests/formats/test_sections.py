"""Sections stand one after the other."""

from rotquant_tvm.formats.sections import Section, sections_in_order


def test_each_begins_where_the_last_ends():
    found = sections_in_order({"a": 64, "b": 0, "c": 32})
    assert found == {"a": Section(0, 64), "b": Section(64, 0), "c": Section(64, 32)}
    assert list(found) == ["a", "b", "c"]
