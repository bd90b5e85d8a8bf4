"""Logging of both processes: one line per record on standard error, as text or JSON.

Anything a client sent passes `printable` before it is printed, so that no request can forge a line,
colour a terminal or fill a disk. Host only: no jax.
"""

import json
import logging
import sys
import time

from jslora.config import LoggingSection

MAX_TEXT = 4000
_ESCAPES = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}
# Line separators that some log readers split at, and marks that reorder what a terminal shows.
_ESCAPES |= {
    code: f"\\u{code:04x}"
    for code in (
        0x200E,
        0x200F,
        *range(0x2028, 0x202F),
        *range(0x2066, 0x206A),
        *range(0xD800, 0xE000),
    )
}
_INLINE = _ESCAPES | {ord("\n"): "\\n", ord("\t"): "\\t"}


def printable(value: object, limit: int = 200) -> str:
    """Make a client's text safe for a log line or an error: escaped, and at most `limit` long."""
    text = str(value)[: limit + 1].translate(_INLINE)
    return text if len(text) <= limit else text[:limit] + "…"


class TextFormatter(logging.Formatter):
    """`12:41:03 warning  message`, and a traceback below it where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = record.levelname.lower()
        line = f"{clock} {level:<8} {printable(record.getMessage(), MAX_TEXT)}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info).translate(_ESCAPES)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per record; keys given as `extra={"fields": {...}}` join it."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:MAX_TEXT],
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure(section: LoggingSection) -> None:
    """Send the records of this process to standard error in the configured form and level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if section.format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("jslora").setLevel(section.level.upper())
    # What uvicorn would report is answered or logged by the application.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
