"""The routes: who may call them, what they read, and which part of the server answers.

A key is checked by the router a route belongs to, before its body is read.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any

import pydantic
from fastapi import APIRouter, Depends, Path, Request
from fastapi.openapi.docs import get_swagger_ui_html
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from jslora import __version__
from jslora.config import Key
from jslora.errors import InvalidRequest, UnknownModel
from jslora.request import AdapterInfo
from jslora.server import openai, schema
from jslora.server.auth import Forbidden
from jslora.server.body import read_model
from jslora.server.generation import Generation
from jslora.server.prepare import chat_job, completion_job
from jslora.server.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadBody,
    TokenizeBody,
    UnloadBody,
)
from jslora.server.service import Service

log = logging.getLogger("jslora.server")

# What routes depend on ----------------------------------------------------------------------------


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Server = Annotated[Service, Depends(_service)]


async def _caller(request: Request, service: Server) -> Key:
    return service.keys.identify(request.headers.get("authorization", ""))


Caller = Annotated[Key, Depends(_caller)]


async def _admin(service: Server, key: Caller) -> None:
    if not key.admin:
        raise Forbidden("this key may not load or unload adapters")
    service.engine()
    if not service.config.adapters.runtime_loading:
        raise Forbidden("adapters.runtime_loading is off in this server's configuration")


def _body[Body: pydantic.BaseModel](
    model: type[Body],
) -> Callable[[Request, Service], Coroutine[Any, Any, Body]]:
    async def read(request: Request, service: Server) -> Body:
        return await read_model(request, model, service.config.server.max_body_bytes)

    return read


Name = Annotated[str, Path(max_length=256)]

probes = APIRouter(tags=["server"], responses=schema.errors())
generation = APIRouter(
    tags=["generation"],
    dependencies=[Depends(_caller)],
    responses=schema.errors(*schema.BODY_ERRORS),
)
models = APIRouter(
    tags=["models"], dependencies=[Depends(_caller)], responses=schema.errors(400, 401, 404)
)
adapters = APIRouter(
    tags=["adapters"],
    dependencies=[Depends(_admin)],
    responses=schema.errors(*schema.BODY_ERRORS),
    default_response_class=PlainTextResponse,
)
documentation = APIRouter(dependencies=[Depends(_caller)], include_in_schema=False)

# Probes and metrics, which need no key ------------------------------------------------------------


@probes.get("/health")
@probes.get("/health/ready")
@probes.get("/ping")
@probes.post("/ping")
async def ready(service: Server) -> JSONResponse:
    """200 while requests are served; 503 while starting, restarting or draining."""
    service.engine()
    return JSONResponse({"status": "ready"})


@probes.get("/health/live")
async def live(service: Server) -> JSONResponse:
    """200 while this process works, whatever the engine does."""
    return JSONResponse({"status": service.client.state})


@probes.get("/version")
async def version() -> JSONResponse:
    """The version of this server."""
    return JSONResponse({"version": __version__})


@probes.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Server) -> Response:
    """Prometheus metrics."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


# Generation and the tokenizer ---------------------------------------------------------------------


@generation.post(
    "/v1/completions", responses=schema.STREAMS, openapi_extra=schema.reads(CompletionBody)
)
async def completions(
    service: Server, key: Caller, body: Annotated[CompletionBody, Depends(_body(CompletionBody))]
) -> Response:
    """Continue prompts given as text or token ids; `model` names the base or an adapter."""
    began = time.perf_counter()
    return Generation(service, await completion_job(service, body, key), began)


@generation.post(
    "/v1/chat/completions", responses=schema.STREAMS, openapi_extra=schema.reads(ChatBody)
)
async def chat(
    service: Server, key: Caller, body: Annotated[ChatBody, Depends(_body(ChatBody))]
) -> Response:
    """Answer a conversation; `model` names the base or an adapter."""
    began = time.perf_counter()
    return Generation(service, await chat_job(service, body, key), began)


@generation.post("/tokenize", openapi_extra=schema.reads(TokenizeBody))
async def tokenize(
    service: Server, key: Caller, body: Annotated[TokenizeBody, Depends(_body(TokenizeBody))]
) -> Response:
    """Token ids of a prompt, or of messages through the chat template."""
    length = service.engine().max_model_len
    if body.model is not None:
        service.adapter(body.model, key)
    if body.prompt is not None:
        ids = await service.encode(body.prompt, length, body.add_special_tokens)
    else:
        messages = [message.plain() for message in body.messages or ()]
        ids = await service.render(messages, length, body.add_generation_prompt)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": length, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [service.tokenizer.token_text(id) for id in ids]
    return _json(answer)


@generation.post("/detokenize", openapi_extra=schema.reads(DetokenizeBody))
async def detokenize(
    service: Server, key: Caller, body: Annotated[DetokenizeBody, Depends(_body(DetokenizeBody))]
) -> Response:
    """The text of token ids."""
    service.engine()
    if body.model is not None:
        service.adapter(body.model, key)
    return _json({"prompt": await service.decode(body.tokens)})


# What is served -----------------------------------------------------------------------------------


@models.get("/v1/models")
async def list_models(service: Server, key: Caller) -> Response:
    """The base model and the adapters this key may use."""
    length = service.engine().max_model_len
    usable = [i.name for i in service.adapters(key) if i.state not in ("draining", "failed")]
    cards = [_card(service, name, length) for name in (service.base, *usable)]
    return _json({"object": "list", "data": cards})


@models.get("/v1/models/{name}")
async def show_model(service: Server, key: Caller, name: Name) -> Response:
    """The base model or an adapter."""
    length = service.engine().max_model_len
    service.adapter(name, key)
    return _json(_card(service, name, length))


@models.get("/v1/adapters")
async def list_adapters(service: Server, key: Caller) -> Response:
    """Adapters, with the reports of how they were bound and where they are."""
    service.engine()
    return _json({"object": "list", "data": _reports(service.adapters(key), key)})


@models.get("/v1/adapters/{name}")
async def show_adapter(service: Server, key: Caller, name: Name) -> Response:
    """One adapter, as in the list."""
    service.engine()
    found = [info for info in service.adapters(key) if info.name == name]
    if not found:
        raise UnknownModel("there is no adapter of this name", param="name")
    return _json(_reports(found, key)[0])


# Loading and unloading, for administrators --------------------------------------------------------


@adapters.post("/v1/load_lora_adapter", openapi_extra=schema.reads(LoadBody))
async def load(
    service: Server, key: Caller, body: Annotated[LoadBody, Depends(_body(LoadBody))]
) -> PlainTextResponse:
    """Load an adapter from a folder below `adapters.roots`."""
    name = body.lora_name
    taken = name in service.client.adapters and not body.load_inplace
    if taken or name == service.base:
        raise InvalidRequest(f"the name {name!r} is taken", param="lora_name")
    await service.client.load_adapter(name, body.lora_path, body.load_inplace)
    log.info("adapter %s was loaded by %s", name, key.tenant)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@adapters.post("/v1/unload_lora_adapter", openapi_extra=schema.reads(UnloadBody))
async def unload(
    service: Server, key: Caller, body: Annotated[UnloadBody, Depends(_body(UnloadBody))]
) -> PlainTextResponse:
    """Let an adapter's requests finish, then forget it."""
    name = body.lora_name
    if name not in service.client.adapters:
        raise UnknownModel(f"the adapter {name!r} is not loaded", param="lora_name")
    await service.client.unload_adapter(name)
    log.info("adapter %s was unloaded by %s", name, key.tenant)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


# Documentation ------------------------------------------------------------------------------------


@documentation.get("/openapi.json")
async def openapi_document(request: Request) -> JSONResponse:
    """The OpenAPI document."""
    return JSONResponse(schema.build(request.app))


@documentation.get("/docs")
async def docs() -> HTMLResponse:
    """A page that shows it."""
    return get_swagger_ui_html(openapi_url="/openapi.json", title="jslora")


def _json(value: Any) -> Response:
    return Response(openai.encode(value), media_type="application/json")


def _card(service: Service, name: str, length: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "jslora",
        "root": name,
        "parent": None if name == service.base else service.base,
        "max_model_len": length,
    }


def _reports(adapters: Sequence[AdapterInfo], key: Key) -> list[dict[str, Any]]:
    """Bind reports; where an adapter's files lie is for administrators."""
    reports = [dataclasses.asdict(info) for info in adapters]
    if not key.admin:
        for report in reports:
            del report["path"]
    return reports
