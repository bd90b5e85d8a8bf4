"""The routes: who may call them, what they read, and which part of the server answers.

A key is checked by the router a route belongs to, before its body is read.
"""

import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any

import msgspec
import pydantic
from fastapi import APIRouter, Depends, Path, Request
from fastapi.openapi.docs import get_swagger_ui_html
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from jslora import __version__
from jslora.aliases import Alias
from jslora.config import NAME, Key
from jslora.errors import UnknownModel
from jslora.request import AdapterInfo
from jslora.server import openai, schema
from jslora.server.auth import Forbidden, may_use
from jslora.server.body import read_model
from jslora.server.generation import Generation
from jslora.server.prepare import chat_job, completion_job
from jslora.server.protocol import (
    AliasBody,
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
        raise Forbidden("this key may not change which models are served")
    service.engine()


async def _loader(service: Server, _: Annotated[None, Depends(_admin)]) -> None:
    if not service.config.adapters.runtime_loading:
        raise Forbidden("adapters.runtime_loading is off in this server's configuration")


def _body[Body: pydantic.BaseModel](
    model: type[Body],
) -> Callable[[Request, Service], Coroutine[Any, Any, Body]]:
    async def read(request: Request, service: Server) -> Body:
        return await read_model(request, model, service.config.server.max_body_bytes)

    return read


Name = Annotated[str, Path(max_length=256)]
NewName = Annotated[str, Path(pattern=rf"^{NAME}$")]

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
    dependencies=[Depends(_loader)],
    responses=schema.errors(*schema.BODY_ERRORS),
    default_response_class=PlainTextResponse,
)
aliases = APIRouter(
    tags=["aliases"],
    dependencies=[Depends(_admin)],
    responses=schema.errors(*schema.BODY_ERRORS),
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
    "/v1/completions", responses=schema.GENERATES, openapi_extra=schema.reads(CompletionBody)
)
async def completions(
    service: Server, key: Caller, body: Annotated[CompletionBody, Depends(_body(CompletionBody))]
) -> Response:
    """Continue prompts given as text or token ids; `model` names the base or an adapter.

    With the base, `adapters` names several with scales, whose deltas are added up.
    """
    began = time.perf_counter()
    return Generation(service, await completion_job(service, body, key), began)


@generation.post(
    "/v1/chat/completions", responses=schema.GENERATES, openapi_extra=schema.reads(ChatBody)
)
async def chat(
    service: Server, key: Caller, body: Annotated[ChatBody, Depends(_body(ChatBody))]
) -> Response:
    """Answer a conversation; `model` and `adapters` are as for completions."""
    began = time.perf_counter()
    return Generation(service, await chat_job(service, body, key), began)


@generation.post("/tokenize", openapi_extra=schema.reads(TokenizeBody))
async def tokenize(
    service: Server, key: Caller, body: Annotated[TokenizeBody, Depends(_body(TokenizeBody))]
) -> Response:
    """Token ids of a prompt, or of messages through the chat template."""
    length = service.engine().max_model_len
    if body.model is not None:
        service.names.resolve(body.model, key)
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
        service.names.resolve(body.model, key)
    return _json({"prompt": await service.decode(body.tokens)})


# What is served -----------------------------------------------------------------------------------


@models.get("/v1/models")
async def list_models(service: Server, key: Caller) -> Response:
    """The base model and the adapters and aliases this key may use."""
    length = service.engine().max_model_len
    cards = [_card(service, name, length) for name in service.names.visible(key)]
    return _json({"object": "list", "data": cards})


@models.get("/v1/models/{name}")
async def show_model(service: Server, key: Caller, name: Name) -> Response:
    """The base model, an adapter or an alias."""
    length = service.engine().max_model_len
    service.names.resolve(name, key)
    return _json(_card(service, name, length))


@models.get("/v1/adapters")
async def list_adapters(service: Server, key: Caller) -> Response:
    """Adapters, with the reports of how they were bound and where they are now."""
    service.engine()
    infos = await service.client.adapters.describe_all()
    seen = sorted((i for i in infos if may_use(key, i.name)), key=lambda info: info.name)
    return _json({"object": "list", "data": _reports(seen, key)})


@models.get("/v1/adapters/{name}")
async def show_adapter(service: Server, key: Caller, name: Name) -> Response:
    """One adapter, as in the list."""
    service.engine()
    if not may_use(key, name):
        raise UnknownModel("there is no adapter of this name", param="name")
    return _json(_reports([await service.client.adapters.describe(name)], key)[0])


@models.get("/v1/aliases")
async def list_aliases(service: Server, key: Caller) -> Response:
    """The aliases this key may use, with what they lead to."""
    cards = [_alias(name, alias) for name, alias in service.names.aliases(key).items()]
    return _json({"object": "list", "data": cards})


@models.get("/v1/aliases/{name}")
async def show_alias(service: Server, key: Caller, name: Name) -> Response:
    """One alias, as in the list."""
    return _json(_alias(name, service.names.alias(name, key)))


# Changing it, for administrators ------------------------------------------------------------------


@adapters.post("/v1/load_lora_adapter", openapi_extra=schema.reads(LoadBody))
async def load(
    service: Server, key: Caller, body: Annotated[LoadBody, Depends(_body(LoadBody))]
) -> PlainTextResponse:
    """Load an adapter from a folder below `adapters.roots`."""
    name = body.lora_name
    service.names.check_load(name)
    await service.client.adapters.load(name, body.lora_path, body.load_inplace)
    log.info("adapter %s was loaded by %s", name, key.tenant)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@adapters.post("/v1/unload_lora_adapter", openapi_extra=schema.reads(UnloadBody))
async def unload(
    service: Server, key: Caller, body: Annotated[UnloadBody, Depends(_body(UnloadBody))]
) -> PlainTextResponse:
    """Refuse an adapter from now on, let its requests finish, and answer once it is freed."""
    name, patience = body.lora_name, body.drain_seconds
    service.names.check_unload(name)
    if patience is None:
        patience = service.config.adapters.drain_seconds
    await service.client.adapters.unload(name, patience)
    log.info("adapter %s was unloaded by %s", name, key.tenant)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


@aliases.put("/v1/aliases/{name}", openapi_extra=schema.reads(AliasBody))
async def put_alias(
    service: Server,
    key: Caller,
    name: NewName,
    body: Annotated[AliasBody, Depends(_body(AliasBody))],
) -> Response:
    """Let a name lead to adapters, or the base, in proportion to weights."""
    service.engine()  # while the body came, it may have gone, and the targets with it
    alias = service.names.put_alias(name, body.targets)
    log.info("alias %s was set to %s by %s", name, dict(alias.targets), key.tenant)
    return _json(_alias(name, alias))


@aliases.post("/v1/aliases/{name}/rollback")
async def roll_back_alias(service: Server, key: Caller, name: NewName) -> Response:
    """Let an alias lead to where it led before its last change."""
    alias = service.names.roll_back_alias(name)
    log.info("alias %s was rolled back to %s by %s", name, dict(alias.targets), key.tenant)
    return _json(_alias(name, alias))


@aliases.delete("/v1/aliases/{name}")
async def delete_alias(service: Server, key: Caller, name: NewName) -> Response:
    """Delete an alias; what it leads to stays."""
    service.names.remove_alias(name)
    log.info("alias %s was deleted by %s", name, key.tenant)
    return _json({"name": name, "object": "alias", "deleted": True})


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
    base = service.names.base
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "jslora",
        "root": name,
        "parent": None if name == base else base,
        "max_model_len": length,
    }


def _alias(name: str, alias: Alias) -> dict[str, Any]:
    return {
        "name": name,
        "object": "alias",
        "targets": dict(alias.targets),
        "previous": None if alias.previous is None else dict(alias.previous),
    }


def _reports(adapters: Sequence[AdapterInfo], key: Key) -> list[dict[str, Any]]:
    """Reports as they are sent; where an adapter's files lie is for administrators."""
    reports: list[dict[str, Any]] = msgspec.to_builtins(adapters)
    if not key.admin:
        for report in reports:
            del report["path"]
    return reports
