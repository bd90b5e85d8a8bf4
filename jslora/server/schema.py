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
_REFERENCE = "#/components/schemas/{model}"


class ErrorDetail(pydantic.BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(pydantic.BaseModel):
    """Every error's body."""

    error: ErrorDetail


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Declare the error statuses of a route; any route may answer 500 and 503."""
    declared = {"application/json": {"schema": _reference(ErrorResponse)}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": declared}
        for status in (*statuses, 500, 503)
    }


STREAMS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
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
    schemes = {"bearer": {"type": "http", "scheme": "bearer"}}
    document["components"]["securitySchemes"] = schemes
    document["security"] = [{}, {"bearer": []}]
    return document


def _reference(model: type[pydantic.BaseModel]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}
