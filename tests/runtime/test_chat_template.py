"""Chat templates must render as Hugging Face's apply_chat_template does."""

from __future__ import annotations

import re

import pytest

from rotquant_tvm.errors import ArtifactError, UsageError
from rotquant_tvm.runtime.chat_template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Say "<b>é</b>" & go.\n'},
    {"role": "assistant", "content": "ok", "extra": {"b": [1, None], "a": "é<"}},
    {"role": "user", "content": "again"},
]
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "blocks trimmed": """
        {%- for message in messages %}
            {% if message.role == "user" %}
                {{ bos_token }}[INST] {{ message.content | trim }} [/INST]
            {% else %}
                {{ message.content }}{{ eos_token }}
            {% endif %}
        {% endfor %}
    """,
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "loop controls": (
        "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m.role }}{% endfor %}"
    ),
    "generation block": (
        "{% for m in messages %}{% generation %}\n  {{ m.content }}{% endgeneration %}\n{% endfor %}end"
    ),
    "namespace and tools": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
        "{% if tools is not none %}tools{% endif %}{{ documents is none }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers_does(name, add_generation_prompt):
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = chat_template_utils.render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=add_generation_prompt, **tokens
    )
    assert ChatTemplate(TEMPLATES[name], tokens).render(MESSAGES, add_generation_prompt) == expected[0]


def test_strftime_now_is_there():
    assert re.fullmatch(r"20\d\d", ChatTemplate("{{ strftime_now('%Y') }}", {}).render(MESSAGES))


def test_a_template_can_refuse():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(UsageError, match="refuses these messages: roles must alternate"):
        template.render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].content.format.__globals__ }}",
    ],
)
def test_templates_cannot_leave_the_sandbox(source):
    messages = [dict(message) for message in MESSAGES]
    try:
        shown = ChatTemplate(source, {}).render(messages)
    except UsageError:
        shown = ""
    assert "class" not in shown and "globals" not in shown
    assert messages == MESSAGES


def test_an_invalid_template_is_an_artifact_error():
    with pytest.raises(ArtifactError, match="not valid Jinja"):
        ChatTemplate("{% if %}", {})


@pytest.mark.parametrize(
    "messages", [[], "hello", {"role": "user", "content": "x"}, ["x"], [{"content": "x"}]]
)
def test_malformed_conversations_are_refused(messages):
    with pytest.raises(UsageError):
        ChatTemplate(TEMPLATES["chatml"], {}).render(messages)


def test_a_message_without_content_is_refused_by_templates_that_read_it():
    with pytest.raises(UsageError, match="refuses"):
        ChatTemplate(TEMPLATES["chatml"], {}).render([{"role": "user"}])
