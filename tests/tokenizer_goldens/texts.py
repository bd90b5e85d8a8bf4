"""Texts, conversations and chat templates that the tokenizer goldens are made of."""

from typing import Any

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it jumps back again.",
    "She sells sea shells by the sea shore; the shells that she sells are sea shells, I'm sure.",
    "In 2024 we've counted 1234 ships, 56 boats and 7890 oars in the northern harbour.",
    "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2))  # three",
    "Der schnelle braune Fuchs springt über den faulen Hund. Größe, Äpfel, Öl.",
    "日本語の文章です。漢字とかなが混ざっています。日本の朝は早いです。",
    "Быстрая коричневая лиса прыгает через ленивую собаку и снова назад.",
    "They'll say it isn't so, but it's what we've always done: don't panic, and don't stop.",
    '{"name": "value", "list": [1, 2, 3], "nested": {"key": null, "other": true}}',
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer.",
] * 3

TEXTS = [
    "",
    " ",
    "   ",
    "Hello world",
    " Hello",
    "  two  spaces  ",
    "one\n\ntwo\n three\r\n\r\nfour\t\tfive \n",
    "I'm you're WE'LL it's 'tis DON'T they'Ve",
    "12345678 3.14159 1,000,000 x2 2x 2026-11-22",
    "def f(x):\n    return x**2  # comment\n",
    "héllo wörld naïve café Größe",
    "日本語のテキスト、漢字とかな。",
    "Привет, мир! Быстрая лиса",
    "مرحبا بالعالم हिन्दी 한국어 สวัสดี",
    "😀👍🏽👩‍👩‍👧 emoji 😀",
    "e\u0301 cafe\u0301 \u212b ﬁ ①",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|im_end|>b <|endoftext|> c<tool_call>d",
    "[INST] hello [/INST] there[INST]",
    "...!!!???---___*** $100 €200",
    "http://example.com/path?x=1&y=%20",
    "\u00a0nbsp\u2003em\u200bzero\u2028line\u0085next",
    "x" * 300,
    "the " * 60,
    "snake_case camelCase PascalCase kebab-case",
    '{"json": [1, 2, {"k": null}]}',
    "control\u0001\u007f",
    "١٢٣ ½ ² Ⅷ ǅ ŉ ß \u017f \ufffd",
    "ends with a space ",
    "'S 'Ll don'T\n'd",
]

_CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_ALTERNATING = """{{ bos_token }}
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' }}
        {%- if loop.first and system is defined %}{{ '<<' ~ system | trim ~ '>> ' }}{% endif %}
        {{- message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
_BLOCKS = """Header
    {# an indented comment #}
  {% set ns = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% endif %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
    {% set ns.count = ns.count + 1 %}
{{ ns.count }}: {{ message | tojson }}
    {% if message.role == 'assistant' %}
{% generation %}{{ message.content }}{% endgeneration %}

    {% endif %}
{% endfor %}
{{ {'é': '<b>&\\'', 'list': [1, 2.5, none, true]} | tojson(indent=2) }}
{% macro shout(text) %}{{ text | upper }}!{% endmacro %}
{{ shout('done') }} {{ strftime_now('no date') }} {{ tools is none }} {{ pad_token is defined }}
{% if add_generation_prompt %}go{% endif %}
"""
_UNSAFE = "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}"

TEMPLATES = {
    "chatml": _CHATML,
    "alternating": _ALTERNATING,
    "blocks": _BLOCKS,
    "unsafe": _UNSAFE,
}

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "  <b>&\"quotes\"</b> 'x' \n"},
        {"role": "assistant", "content": "日本語 😀"},
        {"role": "user", "content": "again"},
    ],
    [{"role": "assistant", "content": "first"}, {"role": "skip", "content": "x"}],
    [{"role": "user", "content": None}],
    [],
]
