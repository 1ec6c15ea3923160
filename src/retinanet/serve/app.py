"""The routes of the service, on FastAPI (an extra: this module is imported by those that have it).

Bodies are read here and not by FastAPI, which would spool uploads to a disk, and to no limit.
"""

# FastAPI reads the routes' annotations, which hold names of make_app(): they are not postponed.
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
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from retinanet import __version__
from retinanet.config import nearest
from retinanet.serve import schema
from retinanet.serve.batching import Batcher, Searched
from retinanet.serve.outside import Outside
from retinanet.serve.page_files import page_files
from retinanet.serve.refusal import Refusal
from retinanet.serve.settings import Settings
from retinanet.serve.upload import FIELD, Room, Upload, check_bytes, read_images

_MOST_DETECTIONS = 10_000

_DESCRIPTION = (
    "Finds objects in images. Every answer that is not 200 holds one line for a person: "
    '`{"detail": "..."}`.'
)

_WHY = {
    400: "An option or the form is not understood.",
    401: "The API key is missing or wrong.",
    403: "A page of another site sent it.",
    404: "There is no such model.",
    408: "The upload took too long.",
    413: "Too many bytes, pixels or images.",
    415: "The body is neither multipart/form-data nor image/*.",
    422: "An image cannot be read.",
    500: "The server failed.",
    503: "Too many images are waiting, or the server starts or stops; see Retry-After.",
    504: "It took too long.",
}

_OPTIONS = (
    *("model", "score_threshold", "nms_threshold"),
    *("class_agnostic", "detections_per_image"),
)

# A type with None would be described as one that takes null.
_LEFT_OUT: Any = None

_BINARY = {"type": "string", "format": "binary"}


def make_app(
    batcher: Batcher, settings: Settings, judged: Mapping[str, Mapping[str, Any] | None]
) -> FastAPI:
    """As :func:`retinanet.serve.build_app`, of which it is the inside."""
    names = list(batcher.detectors)
    room = Room(settings.all_bytes)
    page = page_files()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        app.state.stopping = True
        await asyncio.to_thread(batcher.stop)

    app = FastAPI(
        title="retinanet",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,  # it would load scripts from outside
        redoc_url=None,
        openapi_url=None,  # a route below, which asks for the key
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.stopping = False
    app.state.batcher = batcher
    app.add_middleware(Outside, metrics=batcher.metrics, max_bytes=settings.max_bytes)
    locked = _key_check(settings.api_key)

    def refuse(refusal: Refusal) -> JSONResponse:
        batcher.metrics.failure(refusal.reason)
        return JSONResponse({"detail": refusal.detail}, refusal.status, refusal.headers)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return refuse(error)

    @app.exception_handler(RequestValidationError)
    async def not_understood(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return refuse(_bad_option(error))

    @app.exception_handler(HTTPException)
    async def no_such_address(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = {
            404: "there is nothing at this address",
            405: f"{request.method} is not for this address",
        }.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        return refuse(Refusal(error.status_code, "address", detail, headers))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: Exception) -> Response:
        return refuse(Refusal(499, "gone", "the client has gone"))  # nobody reads it

    @app.post(
        "/v1/detect",
        summary="Find the objects in one image or several",
        response_model=schema.Answer,
        responses=_errors(
            400, 401, 403, 404, 408, 413, 415, 422, 500, 503, 504, key=settings.api_key
        ),
        dependencies=locked,
        openapi_extra=_request_body(settings),
    )
    async def detect(
        request: Request,
        model: Annotated[
            str,
            Query(description="The first if left out.", json_schema_extra={"enum": list(names)}),
        ] = _LEFT_OUT,
        score_threshold: Annotated[
            float,
            Query(ge=0, lt=1, description="Boxes under it are dropped."),
        ] = _LEFT_OUT,
        nms_threshold: Annotated[
            float,
            Query(gt=0, le=1, description="Of two boxes with more IoU the weaker goes."),
        ] = _LEFT_OUT,
        class_agnostic: Annotated[
            bool, Query(description="One box a place, whatever the class.")
        ] = _LEFT_OUT,
        detections_per_image: Annotated[
            int,
            Query(ge=1, le=_MOST_DETECTIONS, description="Boxes an image."),
        ] = _LEFT_OUT,
    ) -> Response:
        """Options that are left out are the model's own; `/v1/model` has them.

        One image that cannot be read stops no other: it stands in `failures`. Where none can be
        read the answer is 422.
        """
        began = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + settings.timeout
        thresholds = {
            "score_threshold": score_threshold,
            "nms_threshold": nms_threshold,
            "class_agnostic_nms": class_agnostic,
            "detections_per_image": detections_per_image,
        }
        _check_origin(request)
        _check_names(request, _OPTIONS)
        name = _model_name(model, names)
        check_bytes(_content_length(request), settings)
        batcher.check_room()
        with room.lent() as take:
            try:
                async with asyncio.timeout_at(deadline):
                    uploads = await read_images(
                        request.headers.get("content-type", ""), request.stream(), settings, take
                    )
            except TimeoutError:
                raise Refusal(
                    408, "slow_client", f"the upload took over {settings.timeout:g} seconds"
                ) from None
            given = {key: value for key, value in thresholds.items() if value is not None}
            results = await _wait(
                request, batcher.submit(name, uploads, given), deadline, settings.timeout
            )
        return _answer(batcher, name, uploads, results, began)

    @app.get(
        "/v1/model",
        summary="The models, their classes and what a request may be",
        response_model=schema.Models,
        responses=_errors(400, 401, 500, key=settings.api_key),
        dependencies=locked,
    )
    async def models(request: Request) -> Response:
        """Each model's name, classes, thresholds, measured quality and speed."""
        _check_names(request, ())
        return JSONResponse(
            {
                "models": [_described(batcher, one, names[0], judged.get(one)) for one in names],
                "limits": {
                    "bytes": settings.max_bytes,
                    "pixels": settings.max_pixels,
                    "images": settings.max_images,
                    "seconds": settings.timeout,
                },
                "version": __version__,
            }
        )

    @app.get(
        "/healthz",
        summary="Whether the process lives",
        response_model=schema.Health,
        responses=_errors(503),
    )
    async def healthz() -> Response:
        """200 as long as requests are answered and the networks' threads run."""
        if batcher.warm and not batcher.alive and not app.state.stopping:
            raise Refusal(503, "internal", "a network's thread has ended: restart the server")
        return JSONResponse({"status": "alive"})

    @app.get(
        "/readyz",
        summary="Whether requests will be taken",
        response_model=schema.Health,
        responses=_errors(503),
    )
    async def readyz() -> Response:
        """200 once the models are loaded and warm, until the server is told to stop."""
        if app.state.stopping:
            raise Refusal(503, "busy", "the server is stopping")
        if not batcher.warm:
            raise Refusal(503, "busy", "the models are warming up", {"Retry-After": "2"})
        return JSONResponse({"status": "ready"})

    @app.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            **_errors(401, key=settings.api_key),
        },
        dependencies=locked,
    )
    async def metrics() -> Response:
        """Prometheus' text format."""
        content, kind = batcher.metrics.text()
        return Response(content, media_type=kind)

    @app.get("/openapi.json", include_in_schema=False, dependencies=locked)
    async def openapi() -> Response:
        return JSONResponse(app.openapi())

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return send_file(request, "index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def asset(request: Request, name: str) -> Response:
        return send_file(request, name)

    def send_file(request: Request, name: str) -> Response:
        file = page.get(name)
        if file is None:
            raise HTTPException(404)
        headers = {"ETag": file.tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.kind, headers=headers)

    return app


def _key_check(api_key: str | None) -> list[Any]:
    """What routes depend on that ask for the key; nothing where there is none."""
    if api_key is None:
        return []
    expected = api_key.encode()

    async def check(
        header: Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))],
        bearer: Annotated[
            HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))
        ],
    ) -> None:
        given = header if header is not None else bearer.credentials if bearer else None
        if given is None or not hmac.compare_digest(given.encode(), expected):
            what = "is missing" if given is None else "is wrong"
            raise Refusal(
                401,
                "key",
                f"the API key {what}: send it as X-API-Key or Authorization: Bearer",
                {"WWW-Authenticate": "Bearer"},
            )

    return [Depends(check)]


def _errors(*codes: int, key: str | None = None) -> dict[int | str, dict[str, Any]]:
    """The errors that a route answers, for its description."""
    return {
        code: {"model": schema.Problem, "description": _WHY[code]}
        for code in codes
        if code != 401 or key is not None
    }


def _request_body(settings: Settings) -> dict[str, Any]:
    form = {
        "type": "object",
        "required": [FIELD],
        "additionalProperties": False,
        "properties": {
            FIELD: {
                "type": "array",
                "minItems": 1,
                "maxItems": settings.max_images,
                "items": _BINARY,
            }
        },
    }
    return {
        "requestBody": {
            "required": True,
            "description": f"At most {settings.max_bytes:,} bytes; an image has at most "
            f"{settings.max_pixels:,} pixels.",
            "content": {"multipart/form-data": {"schema": form}, "image/*": {"schema": _BINARY}},
        }
    }


def _check_origin(request: Request) -> None:
    """Refuse what a page of another site makes a browser send, by what browsers say of it.

    Sec-Fetch-Site comes with every request to https and to this machine itself, Origin with every
    POST. Programs send neither.
    """
    site = request.headers.get("sec-fetch-site")
    if site is None:
        origin = request.headers.get("origin")
        own = origin is None or origin.partition("://")[2] == request.headers.get("host")
    else:
        own = site in ("same-origin", "none")
    if not own:
        raise Refusal(403, "foreign", "pages of other sites may not send images here")


def _check_names(request: Request, known: Sequence[str]) -> None:
    for name in request.query_params:
        if name not in known:
            listed = f"of {', '.join(known)}" if known else "there are none here"
            raise Refusal(
                400, "option", f"unknown option {name[:80]!r}: {listed}{nearest(name, known)}"
            )


def _bad_option(error: RequestValidationError) -> Refusal:
    first = error.errors()[0]
    reason = str(first["msg"]).removeprefix("Input should be ")
    return Refusal(
        400,
        "option",
        f"option {first['loc'][-1]} should be {reason}, got {str(first['input'])[:80]!r}",
    )


def _model_name(given: str | None, names: list[str]) -> str:
    if given is None:
        return names[0]
    if given not in names:
        raise Refusal(
            404,
            "model",
            f"there is no model {given[:80]!r}, but {', '.join(names)}{nearest(given, names)}",
        )
    return given


def _content_length(request: Request) -> int:
    """What the client says; 0 where it says nothing, or nonsense: what comes is counted anyway."""
    given = request.headers.get("content-length", "")
    return int(given) if given.isascii() and given.isdecimal() else 0


async def _wait(
    request: Request, answers: list[Future[Searched]], deadline: float, seconds: float
) -> list[Searched | BaseException]:
    """What came of each image; those that nobody will get are given up.

    Raises:
        Refusal: 504 it took too long, 499 the client has gone.
    """
    loop = asyncio.get_running_loop()
    all_of_them = asyncio.gather(
        *(asyncio.wrap_future(answer) for answer in answers), return_exceptions=True
    )
    # Given up, it ends with a CancelledError, which somebody has to take.
    all_of_them.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        waited_for: set[asyncio.Future[Any]] = {all_of_them, gone}
        done, _ = await asyncio.wait(
            waited_for,
            timeout=max(0, deadline - loop.time()),
            return_when=asyncio.FIRST_COMPLETED,
        )
        if all_of_them in done:
            return all_of_them.result()
        if gone in done:
            raise Refusal(499, "gone", "the client has gone")
        raise Refusal(
            504, "timeout", f"it took over {seconds:g} seconds: send fewer images, or try again"
        )
    finally:
        gone.cancel()
        all_of_them.cancel()  # and with it each image's answer


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer(
    batcher: Batcher,
    model: str,
    uploads: list[Upload],
    results: list[Searched | BaseException],
    began: float,
) -> Response:
    images, failures, refusals = [], [], []
    queue = network = 0.0
    for upload, result in zip(uploads, results, strict=True):
        if isinstance(result, Searched):
            images.append(result.found.to_dict())
            queue = max(queue, result.queue_seconds)
            network += result.network_seconds
        elif isinstance(result, Refusal):
            refusals.append(result)
            failures.append({"file": upload.name, "reason": result.detail})
        else:
            raise result
    if not images:
        statuses = {one.status for one in refusals}
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        first = failures[0]
        raise Refusal(
            statuses.pop() if len(statuses) == 1 else 422,
            refusals[0].reason,
            f"{first['file']}: {first['reason']}{more}",
        )
    for refusal in refusals:
        batcher.metrics.failure(refusal.reason)
    answer = {
        "model": model,
        "images": images,
        "failures": failures,
        "milliseconds": {
            "total": _milliseconds(time.perf_counter() - began),
            "queue": _milliseconds(queue),
            "network": _milliseconds(network),
        },
    }
    content = json.dumps(answer, separators=(",", ":"))
    return Response(content, media_type="application/json", headers={"Cache-Control": "no-store"})


def _described(
    batcher: Batcher, name: str, default: str, judged: Mapping[str, Any] | None
) -> dict[str, Any]:
    detector = batcher.detectors[name]
    seconds = batcher.seconds(name)
    return {
        "name": name,
        "default": name == default,
        "classes": list(detector.classes),
        "category_ids": list(detector.category_ids),
        "image_size": detector.image_size,
        "max_size": detector.max_size,
        "thresholds": dict(detector.thresholds),
        "network": detector.network.description,
        "metrics": None if judged is None else dict(judged),
        "milliseconds": None if seconds is None else _milliseconds(seconds),
    }


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
