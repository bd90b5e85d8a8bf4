"""Chat templates render as transformers renders them, inside a sandbox."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_goldens.texts import TEMPLATES

from jslora import chat
from jslora.chat import ChatTemplate
from jslora.errors import InvalidRequest, ModelError

CASES = json.loads((Path(__file__).parent / "tokenizer_goldens" / "chats.json").read_text())
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("template", TEMPLATES)
def test_texts_and_refusals_equal_transformers(template: str) -> None:
    cases = [case for case in CASES if case["template"] == template]
    assert len(cases) == 10
    compiled = ChatTemplate(TEMPLATES[template], SPECIAL)
    for case in cases:
        if case["text"] is None:
            with pytest.raises(InvalidRequest):
                compiled.render(case["chat"], add_generation_prompt=case["prompt"])
        else:
            text = compiled.render(case["chat"], add_generation_prompt=case["prompt"])
            assert text == case["text"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].pop('role') }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ undefined.attribute }}",
        "{{ 1 // 0 }}",
        "{{ raise_exception('no') }}",
        "{% macro loop() %}{{ loop() }}{% endmacro %}{{ loop() }}",
    ],
)
def test_what_the_sandbox_stops_is_the_requests_fault(source: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot render these messages"):
        ChatTemplate(source, SPECIAL).render(HELLO)


@pytest.mark.parametrize(
    "source", ["{{ messages.__class__ }}", "{{ raise_exception.__globals__ }}"]
)
def test_what_the_sandbox_hides_is_empty(source: str) -> None:
    assert ChatTemplate(source, SPECIAL).render(HELLO) == ""


def test_the_reason_is_told() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", SPECIAL)
    with pytest.raises(InvalidRequest, match="roles must alternate") as refused:
        template.render(HELLO)
    assert refused.value.param == "messages"


def test_the_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_CHARACTERS", 1000)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}", SPECIAL)
    message: dict[str, Any] = {"role": "user", "content": "x" * 99}
    assert len(template.render([message] * 10)) == 1000
    with pytest.raises(InvalidRequest, match="more than 1000 characters"):
        template.render([message] * 11)


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": None, "parts": [1]}]
    with pytest.raises(InvalidRequest):
        ChatTemplate("{{ messages[0].parts.append(2) }}", SPECIAL).render(messages)
    assert messages == [{"role": "user", "content": None, "parts": [1]}]


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% unknown %}"])
def test_a_broken_template_is_the_models_fault(source: str) -> None:
    with pytest.raises(ModelError, match="chat template is not valid"):
        ChatTemplate(source, SPECIAL)
