"""Regular expressions of adapter configurations: what they mean to PEFT, matched in linear time.

PEFT hands them to Python's `re`, which a hostile one keeps busy for ever; here RE2 matches them.
Invariant: a pattern that is accepted matches the same module names in both. RE2 refuses what it
cannot match (look-around, back-references); what both accept but read differently, or Python alone
would refuse, is refused here. Module names are ASCII without line ends. Host only: no jax.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import re2

from jslora.errors import AdapterRejected
from jslora.logs import printable

MAX_LENGTH = 512
MAX_PATTERNS = 1024

# Sets within sets and set operations, POSIX classes, letter and digit escapes beside the usual
# ones, and braces other than {n}, {n,} and {n,m}.
_UNCLEAR = re.compile(
    r"\[\[|\[:|&&|--|~~|\|\|"
    r"|\\(?![dDwWsSbBA])[A-Za-z0-9]"
    r"|\{(?!(?:0|[1-9]\d*)(?:,(?:0|[1-9]\d*)?)?\})"
)


def compile_pattern(key: str, text: object, before: str = "", after: str = "") -> Any:
    """Compile `before + text + after` with RE2; `key` is the configuration key it stands under.

    Raises:
        AdapterRejected: `text` is not a string, is too long, is not a regular expression, or is
            one that RE2 cannot match or would read differently.
    """
    shown = f"{key}: the pattern {printable(text)}"
    if not isinstance(text, str):
        raise AdapterRejected(f"{shown} is not a string")
    if len(text) > MAX_LENGTH:
        raise AdapterRejected(f"{shown} has {len(text)} characters; at most {MAX_LENGTH}")
    if not text.isascii() or _UNCLEAR.search(text):
        raise AdapterRejected(f"{shown} has a construct that RE2 and Python read differently")
    try:
        re.compile(before + text + after)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterRejected(f"{shown} is no regular expression: {error}") from None
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(before + text + after, options)
    except re2.error as error:
        reason = error.args[0].decode() if error.args else "refused"
        raise AdapterRejected(f"{shown} cannot be matched in linear time: {reason}") from None


class PatternTable[Value]:
    """A `rank_pattern` or `alpha_pattern`: the first key that matches the end of a name decides."""

    def __init__(self, key: str, table: Mapping[str, Value], default: Value) -> None:
        if len(table) > MAX_PATTERNS:
            raise AdapterRejected(f"{key} has {len(table)} patterns; at most {MAX_PATTERNS}")
        self._key = key
        self._default = default
        self._patterns = {
            text: (compile_pattern(key, text, r"(.*\.)?(", ")$"), value)
            for text, value in table.items()
        }

    def get(self, name: str) -> Value:
        """The value for a module name."""
        for pattern, value in self._patterns.values():
            if pattern.match(name):
                return value
        return self._default

    def warnings(self, names: Collection[str]) -> list[str]:
        """One line if there are patterns that match none of `names`."""
        unused = [
            printable(text)
            for text, (pattern, _) in self._patterns.items()
            if not any(pattern.match(name) for name in names)
        ]
        if not unused:
            return []
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if unused[5:] else "")
        return [f"{self._key}: no targeted module matches {shown}"]
