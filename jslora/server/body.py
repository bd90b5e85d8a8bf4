"""Request bodies: counted while they arrive, parsed as strict JSON, validated by pydantic.

Stricter than most parsers, because what is accepted here is later trusted: no NaN or Infinity, no
lone surrogates, no integer beyond 2^53 (JavaScript would round it), no nesting beyond 64 levels.
"""

import asyncio
from typing import Any

import msgspec
import pydantic
from starlette.requests import ClientDisconnect, Request

from jslora.errors import InvalidRequest, JsloraError
from jslora.logs import printable

MAX_DEPTH = 64
MAX_INT = 2**53
BODY_SECONDS = 60.0
_LARGE = 64 * 2**10


class TooLarge(JsloraError):
    """The body is larger than `server.max_body_bytes`."""

    status = 413
    type = "invalid_request_error"


class WrongContentType(JsloraError):
    """The body is not declared to be JSON."""

    status = 415
    type = "invalid_request_error"


class TooSlow(JsloraError):
    """The body did not arrive in time."""

    status = 408
    type = "invalid_request_error"


async def read_model[Body: pydantic.BaseModel](
    request: Request, model: type[Body], max_bytes: int
) -> Body:
    """Read the body of a request as `model`.

    Raises:
        JsloraError: as `read_body` and `parse`.
    """
    raw = await read_body(request, max_bytes)
    if len(raw) > _LARGE:  # keeps the event loop free
        return await asyncio.to_thread(parse, model, raw)
    return parse(model, raw)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read a body of declared type JSON.

    Raises:
        WrongContentType, TooLarge, TooSlow: as they say; nothing more is read then.
        InvalidRequest: the client closed the connection before its end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise WrongContentType("the request needs the header Content-Type: application/json")
    too_large = TooLarge(f"the body is larger than the {max_bytes} bytes this server accepts")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    raw = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise TooSlow(f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
    except ClientDisconnect:
        raise InvalidRequest("the connection closed before the end of the body") from None
    return bytes(raw)


def parse[Body: pydantic.BaseModel](model: type[Body], raw: bytes) -> Body:
    """Parse and validate one JSON object.

    Raises:
        InvalidRequest: naming the first offending field, its value and what is allowed.
    """
    try:
        data = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest(f"the body nests deeper than {MAX_DEPTH} levels") from None
    if not isinstance(data, dict):
        raise InvalidRequest("the body must be a JSON object")
    check_values(data)
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        raise _explain(error) from None


def check_values(data: Any) -> None:
    """Bound the depth and the integers of parsed JSON.

    Raises:
        InvalidRequest: a value is out of bounds.
    """
    stack = [(data, 1)]
    while stack:
        container, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"the body nests deeper than {MAX_DEPTH} levels")
        for value in container.values() if isinstance(container, dict) else container:
            kind = type(value)
            if kind is dict or kind is list:
                stack.append((value, depth + 1))
            elif kind is int and not -MAX_INT <= value <= MAX_INT:
                raise InvalidRequest(f"the integer {printable(value, 40)} is beyond 2^53")


def _explain(error: pydantic.ValidationError) -> InvalidRequest:
    """The first problem pydantic found, in our words."""
    problem = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return InvalidRequest(f"{name} is required", param=name)
    reason = problem["msg"].removeprefix("Value error, ")
    given = printable(repr(problem["input"]), 80)
    return InvalidRequest(f"{name}: {reason} (got {given})", param=printable(name, 80))
