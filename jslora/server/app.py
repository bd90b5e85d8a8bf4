"""The ASGI application: routes, the one form of every error, and the id of every request."""

import logging
import math
import re
import uuid

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jslora.errors import JsloraError, Unauthorized
from jslora.logs import printable
from jslora.server import routes
from jslora.server.service import Draining, Service, openai_error

log = logging.getLogger("jslora.server")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


def create_app(service: Service) -> ASGIApp:
    """Put the application together."""
    # FastAPI's telemetry would pick up exporters from the environment.
    telemetry: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
    app = FastAPI(
        title="jslora", docs_url=None, redoc_url=None, openapi_url=None, telemetry=telemetry
    )
    app.state.service = service
    for router in (
        routes.probes,
        routes.generation,
        routes.models,
        routes.adapters,
        routes.aliases,
        routes.documentation,
    ):
        app.include_router(router)
    app.add_exception_handler(JsloraError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(Exception, _on_bug)
    return RequestIds(app)


class RequestIds:
    """Gives every response an X-Request-Id: the request's own if it is fit to print."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope.get("headers", ())).get(b"x-request-id", b"")
        id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", id)]
            await send(message)

        await self.app(scope, receive, send_with_id)


def error_response(error: JsloraError) -> JSONResponse:
    """An error as a response, with what clients need to decide on a retry."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(max(error.retry_after, 1.0)))
    elif error.status >= 500:
        headers["x-should-retry"] = "false"
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Draining):
        headers["Connection"] = "close"
    return JSONResponse(openai_error(error), error.status, headers)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    """A `JsloraError` as a response, counted and, if it is our fault, logged."""
    assert isinstance(error, JsloraError)
    if request.method == "POST":
        request.app.state.service.metrics.rejected(error)
    if error.status >= 500 and error.retry_after is None:
        log.error("%s %s: %s", request.method, printable(request.scope["path"]), error.message)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path = printable(request.scope["path"])
    message = {
        404: f"there is nothing at {path}",
        405: f"{request.method} is not allowed at {path}",
    }.get(error.status_code, "the request cannot be served")
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    return _plain(error.status_code, message, kind, error.headers)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    """Path parameters FastAPI refuses; bodies are refused by `body.parse`."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    return _plain(400, f"{problem['loc'][-1]}: {problem['msg']}", "invalid_request_error")


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    """Anything unforeseen: the log has it all, the client none of it."""
    log.error("%s failed", printable(request.scope["path"]), exc_info=error)
    return _plain(500, "internal error", "internal_error")


def _plain(status: int, message: str, kind: str, headers: object | None = None) -> JSONResponse:
    error = JsloraError(message)
    error.status, error.type = status, kind
    return JSONResponse(openai_error(error), status, headers)  # type: ignore[arg-type]
