"""Chat templates in Hugging Face's Jinja dialect, rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from rotquant_tvm.errors import ArtifactError, UsageError
from rotquant_tvm.runtime.template_sandbox import BoundedSandbox

Messages = Sequence[Mapping[str, Any]]


class _GenerationBlock(jinja2.ext.Extension):
    """Accepts ``{% generation %}…{% endgeneration %}``, which marks training targets, as plain content."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A parsed chat template.

    ``special_tokens`` are the template's variables such as ``bos_token`` and ``eos_token``. Raises
    ArtifactError if the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = BoundedSandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # Python's own, too: it compiles what Jinja makes of a template
            raise ArtifactError(
                f"the chat template is not valid Jinja ({error}); compile again with a working template, "
                "or pass prompts as plain text"
            ) from error

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation, by default opening the assistant's next turn.

        ``messages``: mappings with ``role`` and ``content``. Raises UsageError for malformed messages and
        for a conversation that the template refuses.
        """
        if isinstance(messages, str | Mapping) or not messages:
            raise UsageError("a chat is a list of messages like {'role': 'user', 'content': '…'}")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise UsageError(f"message {index} of the chat is {message!r}; it needs 'role' and 'content'")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise UsageError(f"the model's chat template refuses these messages: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes for HTML; templates expect plain JSON.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
