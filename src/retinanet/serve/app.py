"""The routes of the service, on FastAPI (extra ``serve``).

Request bodies are read by :mod:`retinanet.serve.upload`: FastAPI would spool uploads to disk, and
without a limit.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from retinanet import __version__
from retinanet.config import nearest
from retinanet.serve import schema
from retinanet.serve.batching import Batcher, Result
from retinanet.serve.errors import RequestError
from retinanet.serve.metrics import CONTENT_TYPE
from retinanet.serve.middleware import Middleware
from retinanet.serve.settings import Settings
from retinanet.serve.upload import FIELD, Body, ByteSemaphore, Upload, check_body_size

_DESCRIPTION = (
    'Object detection in images. Every error response holds one line of text: `{"detail": "..."}`.'
)

_ERRORS = {
    400: "An option or the form is invalid.",
    401: "The API key is missing or wrong.",
    403: "A page of another site sent the request.",
    404: "There is no such model.",
    408: "The upload took too long.",
    413: "Too many bytes, pixels or images.",
    415: "The body is neither multipart/form-data nor image/*.",
    422: "An image cannot be read.",
    500: "Internal server error.",
    503: "The queue is full, or the server is starting or stopping; see Retry-After.",
    504: "The request took too long.",
}

_UNSET: Any = None  # a default of type None would be documented as a nullable option


class DetectOptions(BaseModel):
    """Query parameters of ``/v1/detect``."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(_UNSET, description="Model name; the first model by default.")
    score_threshold: float = Field(_UNSET, ge=0, lt=1, description="Minimum score.")
    nms_threshold: float = Field(_UNSET, gt=0, le=1, description="IoU threshold for NMS.")
    class_agnostic: bool = Field(_UNSET, description="Class-agnostic NMS.")
    detections_per_image: int = Field(
        _UNSET, ge=1, le=10_000, description="Maximum number of detections per image."
    )

    def thresholds(self) -> dict[str, Any]:
        """Return the thresholds that were sent, by the detector's names."""
        sent = self.model_dump(exclude_unset=True, exclude={"model"})
        if "class_agnostic" in sent:
            sent["class_agnostic_nms"] = sent.pop("class_agnostic")
        return sent


class Routes:
    """The routes and their common state.

    Args:
        batcher: runs the detectors.
        settings: limits.
        metrics: AP, AP50, data and split by model name.
    """

    def __init__(
        self,
        batcher: Batcher,
        settings: Settings,
        metrics: Mapping[str, Mapping[str, Any] | None],
    ) -> None:
        self.batcher = batcher
        self.settings = settings
        self.model_metrics = metrics
        self.names = list(batcher.detectors)
        self.semaphore = ByteSemaphore(settings.held_bytes_limit)

    async def detect(
        self, request: Request, options: Annotated[DetectOptions, Query()]
    ) -> Response:
        """Options that are not sent have the values of the model; see `/v1/model`.

        An image that cannot be read is listed in `failures`, and the others are processed. If none
        can be read, the response is 422.
        """
        start = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + self.settings.timeout
        model = self._find_model(options.model)
        _check_origin(request)
        check_body_size(_content_length(request), self.settings)
        self.batcher.check_capacity()
        body = Body(request, self.settings, self.semaphore)
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    uploads = await body.read_uploads()
            except TimeoutError:
                detail = f"the upload took over {self.settings.timeout:g} seconds"
                raise RequestError(408, "slow_upload", detail) from None
            futures = self.batcher.submit(model, uploads, options.thresholds())
            results = await _wait_for_results(request, futures, deadline, self.settings.timeout)
        finally:
            self.semaphore.release(body.size)
        return self._detect_response(model, uploads, results, start)

    async def models(self) -> Response:
        """Return names, classes, thresholds, accuracy and speed of the models, and the limits."""
        limits = {
            "bytes": self.settings.max_bytes,
            "pixels": self.settings.max_pixels,
            "images": self.settings.max_images,
            "seconds": self.settings.timeout,
        }
        models = [self._describe_model(name) for name in self.names]
        return JSONResponse({"models": models, "limits": limits, "version": __version__})

    async def healthz(self, request: Request) -> Response:
        """Return 200 while the process answers requests and the network threads are alive."""
        if not self.batcher.alive and not request.app.state.stopping:
            raise RequestError(503, "internal", "a network thread has ended: restart the server")
        return JSONResponse({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        """Return 200 from the end of the warm-up until the server begins to stop."""
        if request.app.state.stopping or not self.batcher.alive:
            raise RequestError(503, "busy", "the server is starting or stopping")
        return JSONResponse({"status": "ready"})

    async def metrics(self) -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(self.batcher.metrics.export(), media_type=CONTENT_TYPE)

    async def handle_error(self, request: Request, error: Exception) -> Response:
        """Answer an exception with one line of JSON."""
        if isinstance(error, RequestValidationError):
            error = _invalid_option(error)
        elif isinstance(error, ClientDisconnect):
            error = RequestError(499, "disconnected", "the client disconnected")
        assert isinstance(error, HTTPException)
        detail = error.detail
        if not isinstance(error, RequestError):
            detail = {
                404: "no such URL",
                405: f"method not allowed: {request.method}",
            }.get(error.status_code, detail)
        self.batcher.metrics.count_failure(getattr(error, "reason", "route"))
        return JSONResponse({"detail": detail}, error.status_code, error.headers)

    def _find_model(self, name: str | None) -> str:
        if name is None:
            return self.names[0]
        if name not in self.names:
            known = ", ".join(self.names)
            hint = nearest(name, self.names)
            raise RequestError(404, "model", f"no such model: {name[:80]!r}; known: {known}{hint}")
        return name

    def _describe_model(self, name: str) -> dict[str, Any]:
        detector = self.batcher.detectors[name]
        seconds = self.batcher.seconds_per_image(name)
        metrics = self.model_metrics.get(name)
        return {
            "name": name,
            "default": name == self.names[0],
            "classes": list(detector.classes),
            "category_ids": list(detector.category_ids),
            "image_size": detector.image_size,
            "max_size": detector.max_size,
            "thresholds": dict(detector.thresholds),
            "network": detector.network.description,
            "metrics": None if metrics is None else dict(metrics),
            "milliseconds": None if seconds is None else _milliseconds(seconds),
        }

    def _detect_response(
        self,
        model: str,
        uploads: Sequence[Upload],
        results: Sequence[Result | BaseException],
        start: float,
    ) -> Response:
        errors: list[tuple[str, RequestError]] = []
        processed: list[Result] = []
        for upload, result in zip(uploads, results, strict=True):
            if isinstance(result, Result):
                processed.append(result)
            elif isinstance(result, RequestError):
                errors.append((upload.name, result))
            else:
                raise result
        if not processed:
            raise _no_image(errors)
        for _, error in errors:
            self.batcher.metrics.count_failure(error.reason)
        content = {
            "model": model,
            "images": [result.detections.to_dict() for result in processed],
            "failures": [{"file": name, "reason": error.detail} for name, error in errors],
            "milliseconds": {
                "total": _milliseconds(time.perf_counter() - start),
                "queue": _milliseconds(max(result.queue_seconds for result in processed)),
                "network": _milliseconds(sum(result.network_seconds for result in processed)),
            },
        }
        return Response(
            json.dumps(content, separators=(",", ":")),
            media_type="application/json",
            headers={"Cache-Control": "no-store"},
        )


def make_app(
    batcher: Batcher, settings: Settings, metrics: Mapping[str, Mapping[str, Any] | None]
) -> FastAPI:
    """Build the application; arguments as of :func:`retinanet.serve.build_app`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(batcher.start)
        yield
        app.state.stopping = True
        await asyncio.to_thread(batcher.stop)

    app = FastAPI(
        title="retinanet",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,  # it loads scripts from elsewhere
        redoc_url=None,
        openapi_url=None,  # a route that needs the API key replaces it
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.stopping = False
    app.state.batcher = batcher
    routes = Routes(batcher, settings, metrics)
    app.add_middleware(Middleware, metrics=batcher.metrics)
    for kind in (HTTPException, RequestValidationError, ClientDisconnect):
        app.add_exception_handler(kind, routes.handle_error)
    _add_api(app, routes)
    _add_page(app)
    description = app.openapi()  # FastAPI returns the same object every time
    [model] = [
        parameter
        for parameter in description["paths"]["/v1/detect"]["post"]["parameters"]
        if parameter["name"] == "model"
    ]
    model["schema"]["enum"] = routes.names
    return app


def _add_api(app: FastAPI, routes: Routes) -> None:
    key = routes.settings.api_key
    needs_key = [] if key is None else [_api_key_dependency(key)]

    def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
        return {
            code: {"model": schema.ErrorResponse, "description": _ERRORS[code]}
            for code in codes
            if code != 401 or needs_key
        }

    app.add_api_route(
        "/v1/detect",
        routes.detect,
        methods=["POST"],
        summary="Detect objects in one or several images",
        response_model=schema.DetectResponse,
        responses=errors(400, 401, 403, 404, 408, 413, 415, 422, 500, 503, 504),
        dependencies=needs_key,
        openapi_extra=_request_body(routes.settings),
    )
    app.add_api_route(
        "/v1/model",
        routes.models,
        summary="Models, their classes, and the limits of a request",
        response_model=schema.ModelsResponse,
        responses=errors(401, 500),
        dependencies=needs_key,
    )
    for path, route, summary in (
        ("/healthz", routes.healthz, "Liveness"),
        ("/readyz", routes.readyz, "Readiness"),
    ):
        app.add_api_route(
            path, route, summary=summary, response_model=schema.Health, responses=errors(503)
        )
    text: Any = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    app.add_api_route(
        "/metrics",
        routes.metrics,
        summary="Prometheus metrics",
        response_class=Response,
        responses={**text, **errors(401)},
        dependencies=needs_key,
    )

    async def openapi() -> Response:
        return JSONResponse(app.openapi())

    app.add_api_route("/openapi.json", openapi, include_in_schema=False, dependencies=needs_key)


def _add_page(app: FastAPI) -> None:
    files = StaticFiles(packages=[("retinanet.serve", "page")])

    async def page_file(request: Request, name: str = "index.html") -> Response:
        response = await files.get_response(name, request.scope)
        response.headers["Cache-Control"] = "no-cache"
        return response

    app.add_api_route("/", page_file, include_in_schema=False)
    app.add_api_route("/page/{name}", page_file, include_in_schema=False)


def _api_key_dependency(api_key: str) -> Any:
    async def check(
        header: Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))],
        bearer: Annotated[
            HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))
        ],
    ) -> None:
        sent = header if header is not None else bearer.credentials if bearer else None
        if sent is None or not hmac.compare_digest(sent.encode(), api_key.encode()):
            problem = "missing" if sent is None else "wrong"
            raise RequestError(
                401,
                "api_key",
                f"{problem} API key: send it as X-API-Key or Authorization: Bearer",
                {"WWW-Authenticate": "Bearer"},
            )

    return Depends(check)


def _request_body(settings: Settings) -> dict[str, Any]:
    binary = {"type": "string", "format": "binary"}
    images = {"type": "array", "minItems": 1, "maxItems": settings.max_images, "items": binary}
    form = {
        "type": "object",
        "required": [FIELD],
        "additionalProperties": False,
        "properties": {FIELD: images},
    }
    return {
        "requestBody": {
            "required": True,
            "description": f"At most {settings.max_bytes:,} bytes and {settings.max_pixels:,} "
            "pixels per image.",
            "content": {"multipart/form-data": {"schema": form}, "image/*": {"schema": binary}},
        }
    }


def _check_origin(request: Request) -> None:
    """Reject requests that a page of another site makes a browser send.

    Browsers send Sec-Fetch-Site with requests to https and to this machine, and Origin with every
    POST; other programs send neither.
    """
    site = request.headers.get("sec-fetch-site")
    if site is None:
        origin = request.headers.get("origin")
        same = origin is None or origin.partition("://")[2] == request.headers.get("host")
    else:
        same = site in ("same-origin", "none")
    if not same:
        raise RequestError(403, "cross_origin", "pages of other sites may not send images here")


def _invalid_option(error: RequestValidationError) -> RequestError:
    first = error.errors()[0]
    name = str(first["loc"][-1])[:80]
    if first["type"] == "extra_forbidden":
        known = list(DetectOptions.model_fields)
        detail = f"unknown option: {name!r}; known: {', '.join(known)}{nearest(name, known)}"
    else:
        expected = str(first["msg"]).removeprefix("Input should be ")
        detail = f"invalid {name}: {str(first['input'])[:80]!r}; should be {expected}"
    return RequestError(400, "option", detail)


def _content_length(request: Request) -> int:
    """Return the announced body size, or 0: the bytes are counted in any case."""
    value = request.headers.get("content-length", "")
    return int(value) if value.isascii() and value.isdecimal() else 0


async def _wait_for_results(
    request: Request, futures: Sequence[Future[Result]], deadline: float, timeout: float
) -> list[Result | BaseException]:
    """Wait for the result of each image, and cancel them if nobody will receive them.

    Raises:
        RequestError: 504 after `timeout` seconds, 499 if the client disconnects.
    """
    results = asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
    # Retrieve its CancelledError, which asyncio would log as never retrieved.
    results.add_done_callback(lambda done: done.cancelled() or done.exception())
    disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
    tasks: set[asyncio.Future[Any]] = {results, disconnected}
    try:
        seconds = max(0.0, deadline - asyncio.get_running_loop().time())
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if results.done():
            return results.result()
        if disconnected.done():
            raise ClientDisconnect
        detail = f"the request took over {timeout:g} seconds: send fewer images, or try again"
        raise RequestError(504, "timeout", detail)
    finally:
        disconnected.cancel()
        results.cancel()  # also cancels the futures of the images


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _no_image(errors: Sequence[tuple[str, RequestError]]) -> RequestError:
    """Return the error for a request none of whose images can be processed."""
    name, first = errors[0]
    statuses = {error.status_code for _, error in errors}
    others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    status = statuses.pop() if len(statuses) == 1 else 422
    return RequestError(status, first.reason, f"{name}: {first.detail}{others}")


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
