"""Stop strings must not depend on how the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm.errors import UsageError
from rotquant_tvm.runtime.stopping import StopMatcher, stop_strings

words = st.text("abc", min_size=1, max_size=4)


def reference(text, strings):
    """What is shown, by growing the text letter by letter, and the string that ended it."""
    for end in range(1, len(text) + 1):
        ended = [string for string in strings if text[:end].endswith(string)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.text("abc", max_size=30), st.lists(words, max_size=3), st.data())
def test_pieces_give_what_the_whole_text_gives(text, strings, data):
    matcher, shown, rest = StopMatcher(strings), "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        shown += matcher.push(rest[:size])
        assert reference(text, strings)[0].startswith(shown)  # nothing is shown that must be taken back
        rest = rest[size:]
    if matcher.matched is None:
        shown += matcher.finish()
    assert (shown, matcher.matched) == reference(text, strings)


def test_text_is_held_back_only_while_it_may_be_a_stop_string():
    matcher = StopMatcher(["\n\n", "END"])
    assert matcher.push("one\n") == "one"
    assert matcher.push("two E") == "\ntwo "
    assert matcher.push("N") == ""
    assert matcher.push("d.") == "ENd."
    assert matcher.push("EEN") == "E"
    assert matcher.push("D more") == "" and matcher.matched == "END"
    assert matcher.push("more") == "" and matcher.finish() == ""


@pytest.mark.parametrize("stop", ["", ["a", ""], [1]])
def test_empty_stop_strings_are_refused(stop):
    with pytest.raises(UsageError, match="stop string"):
        stop_strings(stop)


def test_one_text_is_one_stop_string():
    assert stop_strings("ab") == ("ab",) and stop_strings(["a", "b"]) == ("a", "b") and stop_strings(()) == ()
