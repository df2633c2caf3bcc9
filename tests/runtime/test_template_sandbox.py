"""Chat templates that would take all memory or never end are refused; ordinary arithmetic and formatting are not."""

from __future__ import annotations

import pytest

from rotquant_tvm.errors import UsageError
from rotquant_tvm.runtime.chat_template import ChatTemplate

HUGE = [
    "'x' * 99999999999",
    "[1] * 9999999999",
    "9999999999 * 'x'",
    "9 ** 999999999",
    "'%0999999999d' % 1",
    "'%*d' % (9, 1)",
]


@pytest.mark.parametrize("expression", HUGE)
def test_huge_values_are_refused(expression):
    for source in (f"{{{{ {expression} }}}}", f"{{% set n = messages %}}{{{{ {expression} }}}}{{{{ n }}}}"):
        with pytest.raises(UsageError, match="is too large"):
            ChatTemplate(source, {}).render([{"role": "user", "content": ""}])


def test_others_are_computed():
    source = (
        "{{ '-' * 3 }}{{ 3 * 'a' }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ '%05.1f|%s' % (2.5, 'x') }}{{ 1.5 * 2 }}{{ [1] * 2 }}"
    )
    text = ChatTemplate(source, {}).render([{"role": "user", "content": ""}])
    assert text == "---aaa31024002.5|x3.0[1, 1]"


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'a' + 1 }}"])
def test_whatever_a_template_raises_is_a_refusal(source):
    with pytest.raises(UsageError, match="chat template refuses these messages"):
        ChatTemplate(source, {}).render([{"role": "user", "content": ""}])
