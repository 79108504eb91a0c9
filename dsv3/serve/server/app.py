"""The endpoints: OpenAI's, those of an operator, and the chat page."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp

import dsv3
from dsv3.errors import UserError
from dsv3.serve.server.config import ServerConfig
from dsv3.serve.server.errors import ApiError, JsonResponse, error_response
from dsv3.serve.server.generation import while_connected
from dsv3.serve.server.metrics import HttpCounter, render_metrics
from dsv3.serve.server.middleware import Gate, RequestLog
from dsv3.serve.server.schemas import ChatRequest, CompletionRequest
from dsv3.serve.server.service import Answer, Service
from dsv3.serve.server.sse import EventStream

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/xray.js": ("xray.js", "text/javascript; charset=utf-8"),
    "/sse.js": ("sse.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def build_app(service: Service, config: ServerConfig, *, keys: Iterable[str] = ()) -> ASGIApp:
    """The whole application, ready for an ASGI server. keys: API keys; none lets everybody in."""
    # The documentation pages of the framework load scripts from elsewhere.
    app = FastAPI(title="dsv3", version=dsv3.__version__, docs_url=None, redoc_url=None)
    counter = HttpCounter()
    for kind in (ApiError, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    _add_api(app, service)
    _add_operation(app, service, counter)
    for path, (name, media_type) in _PAGE.items():
        app.add_api_route(path, _file(name, media_type), include_in_schema=False, methods=["GET", "HEAD"])
    for operations in app.openapi()["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # the framework's status for bad requests; ours is 400
    keys = list(keys)
    local_only = config.is_loopback and not keys
    gate = Gate(app, keys=keys, max_body_bytes=config.max_body_bytes, local_only=local_only)
    return RequestLog(gate, counter)


def _add_api(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_class=Response, responses=_RESPONSES)
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        """Answer a conversation."""
        return await _respond(request, asked.stream, service.chat(asked, tenant=_note(request, asked.user)))

    @app.post("/v1/completions", response_class=Response, responses=_RESPONSES)
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        """Continue texts."""
        return await _respond(request, asked.stream, service.complete(asked, tenant=_note(request, asked.user)))

    @app.get("/v1/models", response_class=Response)
    async def models() -> Response:
        """The one model that is served."""
        return JsonResponse({"object": "list", "data": [service.describe()]})

    @app.get("/v1/models/{model:path}", response_class=Response, responses=_RESPONSES)
    async def one_model(model: str) -> Response:
        """The model, if it is this one."""
        if model != service.name:
            raise ApiError(404, f"there is no model {model!r:.80} here", param="model", code="model_not_found")
        return JsonResponse(service.describe())


def _add_operation(app: FastAPI, service: Service, counter: HttpCounter) -> None:
    @app.get("/health", response_class=Response, responses=_DOWN)
    async def health() -> Response:
        """200 as long as the engine works."""
        return _state(service.engine.alive, "the engine has failed")

    @app.get("/ready", response_class=Response, responses=_DOWN)
    async def ready() -> Response:
        """200 as long as requests are taken."""
        return _state(service.engine.alive and not service.draining, "no requests are taken")

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(render_metrics(service.engine, counter), media_type="text/plain; version=0.0.4; charset=utf-8")


_DOWN: dict[int | str, dict[str, Any]] = {503: {"description": "not so"}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "what is wrong with the request",
        401: "no valid API key",
        404: "no such model",
        413: "the body is too large",
        415: "the body is not JSON",
        429: "too many requests at once: Retry-After says when to try again",
        503: "the server shuts down",
    }.items()
}


async def _respond(request: Request, stream: bool | None, begin: Awaitable[Answer]) -> Response:
    """The answer that `begin` gives, whole or streamed; whatever happens, it is closed."""
    answer = await begin

    async def close() -> None:
        await answer.aclose()
        request.state.log["usage"] = answer.usage.to_json()

    if stream:
        return EventStream(answer.chunks(), close)
    try:
        return JsonResponse(await while_connected(request.receive, answer.whole()))
    except ClientDisconnect:
        return Response(status_code=499)  # which only the log and the metrics will see
    finally:
        await close()


def _note(request: Request, user: str | None) -> str:
    """Write the user into the log; whose prefixes may be shared with this request."""
    if user is not None:
        request.state.log["user"] = user
    return str(request.state.tenant)


def _state(ok: bool, why_not: str) -> Response:
    return JsonResponse({"status": "ok"} if ok else {"status": why_not}, 200 if ok else 503)


async def _answer_error(request: Request, error: Exception) -> Response:
    answer = error_response(error)
    if not isinstance(error, ClientDisconnect):  # of a stream, whose answer has begun and is heard by nobody
        request.state.log["error"] = bytes(answer.body).decode()
    return answer


def _file(name: str, media_type: str) -> Any:
    content = resources.files("dsv3.serve.server").joinpath("static", name).read_bytes()

    async def file() -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return file
