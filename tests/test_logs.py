"""Log lines cannot be forged, whatever is in them."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jslora import logs
from jslora.config import LoggingSection


@pytest.fixture
def restored() -> Iterator[None]:
    """Put the process's logging back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in ("jslora", "uvicorn")}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)


@given(st.text(max_size=300))
def test_printable_text_is_one_plain_line(text: str) -> None:
    shown = logs.printable(text)
    assert len(shown) <= 201 * 6 and len(shown.splitlines()) <= 1
    assert all(ord(c) >= 32 and not 127 <= ord(c) < 160 for c in shown)
    shown.encode("utf-8")


def test_ordinary_text_is_left_alone() -> None:
    assert logs.printable("Grüße, 世界 🙂") == "Grüße, 世界 🙂"
    assert logs.printable("x" * 10, 4) == "xxxx…"
    assert logs.printable("a\nb\x1b[31m") == "a\\nb\\x1b[31m"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_record_is_one_line_and_uvicorn_is_quiet(
    form: str, restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    logs.configure(LoggingSection(format=form, level="info"))  # type: ignore[arg-type]
    log = logging.getLogger("jslora.test")
    log.info("hello %s", "a\nb\u2028c", extra={"fields": {"id": "x\ny"}})
    log.debug("not shown")
    logging.getLogger("uvicorn.error").error("not shown")
    (line,) = out.getvalue().splitlines()
    if form == "json":
        entry = json.loads(line)
        assert entry["message"] == "hello a\nb\u2028c" and entry["id"] == "x\ny"
        assert entry["level"] == "info" and entry["logger"] == "jslora.test"
    else:
        assert line.endswith("hello a\\nb\\u2028c")


@pytest.mark.parametrize("form", ["text", "json"])
def test_tracebacks_are_kept(form: str, restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    logs.configure(LoggingSection(format=form))  # type: ignore[arg-type]
    try:
        raise ValueError("odd \x1b[31m")
    except ValueError:
        logging.getLogger("jslora.test").exception("failed")
    assert "ValueError: odd" in out.getvalue() and "\x1b" not in out.getvalue()
    if form == "json":
        assert len(out.getvalue().splitlines()) == 1
