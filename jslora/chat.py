"""Chat templates: messages → prompt text, rendered as Hugging Face's libraries render them.

A template is code that came with a model, and messages come from strangers: it runs in jinja2's
immutable sandbox, sees plain data only, and its output is bounded. Host only: no jax.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jslora.errors import InvalidRequest, ModelError

MAX_CHARACTERS = 2**24


class ChatTemplate:
    """A compiled template.

    Args:
        source: jinja2 text.
        special_tokens: names such as "bos_token" and their text, visible to the template.

    Raises:
        ModelError: the source is not a valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise, strftime_now=_now)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(f"the model's chat template is not valid: {error}") from None
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: plain JSON data, at least one message; keys that hold None are left out,
                since templates would write "None".
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            InvalidRequest: there is no message, the template refuses the messages, cannot handle
                them, or writes more than `MAX_CHARACTERS`.
        """
        if not messages:
            raise InvalidRequest("messages is empty", param="messages")
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=[{k: v for k, v in m.items() if v is not None} for m in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            ):
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise jinja2.TemplateError(f"it wrote more than {MAX_CHARACTERS} characters")
                pieces.append(piece)
        except Exception as error:  # a template can raise anything on data it did not expect
            raise InvalidRequest(
                f"the model's chat template cannot render these messages: {error}", param="messages"
            ) from error
        return "".join(pieces)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter, which models were not trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
