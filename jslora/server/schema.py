"""What /openapi.json says: the routes' bodies and the errors each of them may answer with."""

from http import HTTPStatus
from typing import Any

import pydantic
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from jslora import __version__
from jslora.server import protocol

_BODIES = (
    protocol.CompletionBody,
    protocol.ChatBody,
    protocol.LoadBody,
    protocol.UnloadBody,
    protocol.AliasBody,
    protocol.TokenizeBody,
    protocol.DetokenizeBody,
)
_RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds until it may succeed; without it, it cannot.",
        "schema": {"type": "integer", "minimum": 1},
    }
}
_REFERENCE = "#/components/schemas/{model}"


class ErrorDetail(pydantic.BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(pydantic.BaseModel):
    """Every error's body."""

    error: ErrorDetail


def _reference(model: type[pydantic.BaseModel]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Declare the error statuses of a route; any route may answer 500 and 503."""
    return {status: _error(status) for status in (*statuses, 500, 503)}


def _error(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference(ErrorResponse)}}
    declared = {"description": HTTPStatus(status).phrase, "content": content}
    return declared | ({"headers": _RETRY_AFTER} if status in (429, 503) else {})


GENERATES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}},
    429: _error(429),
}
BODY_ERRORS = (400, 401, 403, 404, 408, 413, 415)


def reads(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    """Declare the body of a route that reads it itself."""
    declared = {"application/json": {"schema": _reference(model)}}
    return {"requestBody": {"required": True, "content": declared}}


def build(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an application."""
    document = get_openapi(
        title="jslora",
        version=__version__,
        summary="OpenAI-compatible serving of one base model and many LoRA adapters",
        routes=app.routes,
    )
    _, definitions = models_json_schema(
        [(model, "validation") for model in (*_BODIES, ErrorResponse)], ref_template=_REFERENCE
    )
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own; ours are 400
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.clear()
    schemas |= definitions["$defs"]
    for model in (*_BODIES, protocol.ScaledAdapter):
        _allow_null(schemas[model.__name__])
    schemes = {"bearer": {"type": "http", "scheme": "bearer"}}
    document["components"]["securitySchemes"] = schemes
    document["security"] = [{}, {"bearer": []}]
    return document


def _allow_null(body: dict[str, Any]) -> None:
    """Say of every field that may be absent that it may be null, which means the same."""
    for name, field in body["properties"].items():
        kinds = field.get("anyOf", [field])
        if name not in body.get("required", ()) and {"type": "null"} not in kinds:
            default = {key: field.pop(key) for key in ("title", "default") if key in field}
            body["properties"][name] = {"anyOf": [*kinds, {"type": "null"}], **default}
