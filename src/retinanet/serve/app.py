"""The routes of the service, on FastAPI (extra ``serve``).

Request bodies are read by :mod:`retinanet.serve.upload`: FastAPI would spool uploads to disk, and
without a limit.
"""

from __future__ import annotations

import asyncio
import hmac
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
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from retinanet import __version__
from retinanet.config import nearest
from retinanet.inference import ImageDetections
from retinanet.serve import schema
from retinanet.serve.batching import Batcher
from retinanet.serve.metrics import Middleware
from retinanet.serve.settings import Settings
from retinanet.serve.upload import FIELD, Upload, read_uploads

_DESCRIPTION = (
    'Object detection in images. Every error response holds one line of text: `{"detail": "..."}`.'
)

_ERRORS = {
    400: "An option or the form is invalid.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The upload took too long.",
    413: "Too many bytes, pixels or images.",
    415: "The body is neither multipart/form-data nor image/*.",
    422: "An image cannot be read.",
    500: "Internal server error.",
    503: "The queue is full, or the server is starting or stopping; see Retry-After.",
    504: "The request took too long.",
}


class Routes:
    """The routes and their common state."""

    def __init__(
        self,
        batcher: Batcher,
        settings: Settings,
        model_metrics: Mapping[str, Mapping[str, Any] | None],
    ) -> None:
        self.batcher = batcher
        self.settings = settings
        self.model_metrics = model_metrics
        self.names = list(batcher.detectors)

    async def detect(
        self, request: Request, options: Annotated[schema.DetectOptions, Query()]
    ) -> Response:
        """Options that are not sent have the values of the model; see `/v1/model`.

        An image that cannot be read is listed in `failures`, and the others are processed. If none
        can be read, the response is 422.
        """
        start = time.perf_counter()
        model = self._find_model(options.model)
        self.batcher.check_capacity()
        uploads: list[Upload] | None = None
        try:
            async with asyncio.timeout(self.settings.timeout):
                uploads = await read_uploads(request, self.settings)
                futures = self.batcher.submit(model, uploads, options.thresholds())
                results = await _wait_for_results(request, futures)
        except TimeoutError:
            seconds = f"over {self.settings.timeout:g} seconds"
            if uploads is None:
                raise HTTPException(408, f"the upload took {seconds}") from None
            detail = f"the request took {seconds}: send fewer images, or try again"
            raise HTTPException(504, detail) from None
        images, failures = _split_results(uploads, results)
        content = {
            "model": model,
            "images": images,
            "failures": failures,
            "milliseconds": _milliseconds(time.perf_counter() - start),
        }
        return JSONResponse(content, headers={"Cache-Control": "no-store"})

    async def models(self) -> Response:
        """Return names, classes, thresholds, accuracy and speed of the models, and the limits."""
        limits = {
            "bytes": self.settings.max_bytes,
            "pixels": self.settings.max_pixels,
            "seconds": self.settings.timeout,
        }
        models = [self._describe_model(name) for name in self.names]
        return JSONResponse({"models": models, "limits": limits, "version": __version__})

    async def health(self) -> Response:
        """Return 200 from the end of the warm-up, while all network threads are alive."""
        if not self.batcher.ready:
            raise HTTPException(503, "the server is stopping, or a network thread has ended")
        return JSONResponse({"status": "ready"})

    async def metrics(self) -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(self.batcher.metrics.export(), media_type=CONTENT_TYPE_LATEST)

    def _find_model(self, name: str | None) -> str:
        if name is None:
            return self.names[0]
        if name not in self.names:
            known = ", ".join(self.names)
            hint = nearest(name, self.names)
            raise HTTPException(404, f"no such model: {name[:80]!r}; known: {known}{hint}")
        return name

    def _describe_model(self, name: str) -> dict[str, Any]:
        detector = self.batcher.detectors[name]
        seconds = self.batcher.seconds_per_image(name)
        metrics = self.model_metrics.get(name)
        labels = range(len(detector.classes)) if detector.selected is None else detector.selected
        classes = [detector.classes[label] for label in labels]
        thresholds: dict[str, Any] = dict(detector.thresholds)
        by_class = thresholds["score_thresholds"]
        thresholds["score_thresholds"] = {n: s for n, s in by_class.items() if n in classes}
        return {
            "name": name,
            "default": name == self.names[0],
            "classes": classes,
            "category_ids": [detector.category_ids[label] for label in labels],
            "image_size": detector.image_size,
            "max_size": detector.max_size,
            "thresholds": thresholds,
            "network": detector.network.description,
            "metrics": None if metrics is None else dict(metrics),
            "milliseconds": None if seconds is None else _milliseconds(seconds),
        }


def make_app(
    batcher: Batcher, settings: Settings, metrics: Mapping[str, Mapping[str, Any] | None]
) -> FastAPI:
    """Build the application; arguments as of :func:`retinanet.serve.build_app`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(batcher.start)
        yield
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
    app.state.batcher = batcher
    routes = Routes(batcher, settings, metrics)
    app.add_middleware(Middleware, metrics=batcher.metrics)
    for kind in (HTTPException, RequestValidationError, ClientDisconnect):
        app.add_exception_handler(kind, _handle_error)
    _add_api(app, routes)
    _add_page(app)
    description = app.openapi()  # FastAPI returns the same object every time
    for parameter in description["paths"]["/v1/detect"]["post"]["parameters"]:
        if parameter["name"] == "model":
            parameter["schema"]["enum"] = routes.names
    return app


def _add_api(app: FastAPI, routes: Routes) -> None:
    key = routes.settings.api_key
    needs_key = [] if key is None else [_api_key_dependency(key)]

    def add(path: str, route: Any, summary: str, *codes: int, **options: Any) -> None:
        responses: dict[int | str, dict[str, Any]] = {
            code: {"model": schema.ErrorResponse, "description": _ERRORS[code]}
            for code in codes
            if code != 401 or needs_key
        }
        responses.update(options.pop("responses", {}))
        dependencies = needs_key if 401 in codes else []
        app.add_api_route(
            path, route, summary=summary, responses=responses, dependencies=dependencies, **options
        )

    add(
        "/v1/detect",
        routes.detect,
        "Detect objects in one or several images",
        *_ERRORS,
        methods=["POST"],
        response_model=schema.DetectResponse,
        openapi_extra=_request_body(routes.settings),
    )
    summary = "Models, their classes, and the limits of a request"
    add("/v1/model", routes.models, summary, 401, 500, response_model=schema.ModelsResponse)
    add("/healthz", routes.health, "Liveness", 503, response_model=schema.Health)
    add("/readyz", routes.health, "Readiness", 503, response_model=schema.Health)
    text = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    options: Any = {"responses": text, "response_class": Response}
    add("/metrics", routes.metrics, "Prometheus metrics", 401, **options)

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
            detail = f"{problem} API key: send it as X-API-Key or Authorization: Bearer"
            raise HTTPException(401, detail, {"WWW-Authenticate": "Bearer"})

    return Depends(check)


def _request_body(settings: Settings) -> dict[str, Any]:
    binary = {"type": "string", "format": "binary"}
    images = {"type": "array", "minItems": 1, "maxItems": settings.queue, "items": binary}
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


async def _handle_error(request: Request, error: Exception) -> Response:
    """Answer an exception with one line of JSON."""
    if isinstance(error, RequestValidationError):
        error = HTTPException(400, _invalid_option(error))
    elif isinstance(error, ClientDisconnect):
        error = HTTPException(499, "the client disconnected")
    assert isinstance(error, HTTPException)
    routing = {
        "Not Found": "no such URL",
        "Method Not Allowed": f"method not allowed: {request.method}",
    }
    detail = routing.get(error.detail, error.detail)
    return JSONResponse({"detail": detail}, error.status_code, error.headers)


def _invalid_option(error: RequestValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][-1])[:80]
    if first["type"] == "extra_forbidden":
        known = list(schema.DetectOptions.model_fields)
        return f"unknown option: {name!r}; known: {', '.join(known)}{nearest(name, known)}"
    expected = str(first["msg"]).removeprefix("Input should be ")
    return f"invalid {name}: {str(first['input'])[:80]!r}; should be {expected}"


async def _wait_for_results(
    request: Request, futures: Sequence[Future[ImageDetections]]
) -> list[ImageDetections | BaseException]:
    """Wait for the result of each image; cancel them if the client disconnects."""
    results = asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
    disconnected = asyncio.create_task(_wait_for_disconnect(request))
    disconnected.add_done_callback(lambda _: results.cancel())
    try:
        return await results
    except asyncio.CancelledError:
        if disconnected.done():
            raise ClientDisconnect from None
        raise
    finally:
        disconnected.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _split_results(
    uploads: Sequence[Upload], results: Sequence[ImageDetections | BaseException]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return detections and failures as JSON values."""
    images: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    statuses: set[int] = set()
    for upload, result in zip(uploads, results, strict=True):
        if isinstance(result, HTTPException):
            statuses.add(result.status_code)
            failures.append({"file": upload.name, "reason": result.detail})
        elif isinstance(result, BaseException):
            raise result
        else:
            images.append(result.to_dict())
    if not images:
        first, others = failures[0], len(failures) - 1
        more = f" (and {others} more)" if others else ""
        status = statuses.pop() if len(statuses) == 1 else 422
        raise HTTPException(status, f"{first['file']}: {first['reason']}{more}")
    return images, failures


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
