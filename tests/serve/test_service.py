"""The routes of the service, and that their results are the detector's own."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import io
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from small_service import (
    PNG,
    client,
    expected,
    finder,
    form,
    png_image,
    wait_until,
    white_detector,
)

from retinanet import __version__
from retinanet.cli.serve import ServiceOptions
from retinanet.config import DetectConfig
from retinanet.errors import ConfigError, MissingExtraError
from retinanet.inference import Detector
from retinanet.model.checkpoint import Checkpoint
from retinanet.serve import Settings, build_app, schema
from retinanet.serve.batching import Batcher
from retinanet.serve.models import model_metrics, model_names
from tiny_backbone import tiny_network


@pytest.fixture(scope="module")
def detector() -> Detector:
    return white_detector()


@pytest.fixture(scope="module")
def service(detector: Detector) -> Iterator[TestClient]:
    with client({"squares": detector}) as test_client:
        yield test_client


def test_detect_form_returns_images_in_order(service: TestClient, detector: Detector) -> None:
    files = [("b.png", png_image(x=48)), ("sub/a.png", png_image(96, 96)), ("ü.png", png_image())]
    response = service.post("/v1/detect", files=form(*files))
    assert response.status_code == 200
    content = response.json()
    assert (content["model"], content["failures"]) == ("squares", [])
    assert content["images"] == [expected(detector, name, data) for name, data in files]
    # By hand: the square is at (48, 16), 16 pixels wide.
    first = content["images"][0]
    assert (first["file"], first["height"], first["width"]) == ("b.png", 128, 192)
    assert first["detections"][0]["box"] == [48, 16, 64, 32]
    assert [item["class"] for item in first["detections"]] == ["white", "bright"]
    assert [item["category_id"] for item in first["detections"]] == [7, 9]
    assert content["milliseconds"] > 0


def test_detect_image_body_is_named_image(service: TestClient, detector: Detector) -> None:
    response = service.post("/v1/detect", content=png_image(), headers=PNG)
    assert response.json()["images"] == [expected(detector, "image", png_image())]


def test_detect_broken_image_among_others_is_a_failure(service: TestClient) -> None:
    files = form(("a", png_image()), ("cut", png_image()[:60]), ("b", png_image()), ("no", b""))
    response = service.post("/v1/detect", files=files)
    assert response.status_code == 200
    assert [image["file"] for image in response.json()["images"]] == ["a", "b"]
    assert [failure["file"] for failure in response.json()["failures"]] == ["cut", "no"]
    reasons = [failure["reason"] for failure in response.json()["failures"]]
    assert "cannot be read" in reasons[0]
    assert reasons[1] == "the file is empty"


@pytest.mark.parametrize(
    ("files", "detail"),
    [
        ([("cut.png", png_image()[:60])], "cut.png: cannot be read"),
        ([("a.txt", b"hello")], "a.txt: not an accepted image format: send JPEG"),
        ([("a.txt", b"hello"), ("b.png", b"")], r"a.txt: not an accepted .* \(and 1 more\)"),
        ([("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n")], "a.eps: not an accepted image format"),
    ],
)
def test_detect_only_broken_images_is_422(service: TestClient, files: Any, detail: str) -> None:
    response = service.post("/v1/detect", files=form(*files))
    assert response.status_code == 422
    assert response.json().keys() == {"detail"}
    assert re.match(detail, response.json()["detail"]), response.json()
    assert "bytes of an image" not in response.json()["detail"]
    assert "/" not in response.json()["detail"]


def test_detect_options_reach_the_detector(service: TestClient, detector: Detector) -> None:
    for query, options in {
        "score_threshold=0.9": {"score_threshold": 0.9},
        "class_agnostic=true": {"class_agnostic_nms": True},
        "detections_per_image=1": {"detections_per_image": 1},
        "nms_threshold=0.1&score_threshold=0": {"nms_threshold": 0.1, "score_threshold": 0.0},
    }.items():
        response = service.post(f"/v1/detect?{query}", content=png_image(), headers=PNG)
        assert response.json()["images"] == [expected(detector, "image", png_image(), **options)]
    assert len(expected(detector, "image", png_image())["detections"]) == 2
    assert len(expected(detector, "image", png_image(), score_threshold=0.9)["detections"]) == 1


@pytest.mark.parametrize(
    ("query", "status", "detail"),
    [
        ("score_treshold=.5", 400, "'score_treshold'; known: .*; did you mean score_threshold"),
        ("score_threshold=1", 400, "invalid score_threshold: '1'; should be less than 1"),
        ("score_threshold=nan", 400, "score_threshold"),
        ("score_threshold=high", 400, "score_threshold: 'high'; should be a valid number"),
        ("nms_threshold=0", 400, "nms_threshold: '0'; should be greater than 0"),
        ("class_agnostic=perhaps", 400, "class_agnostic: .* should be a valid boolean"),
        ("detections_per_image=0", 400, "detections_per_image: .* greater than or equal"),
        ("detections_per_image=99999999999999999999", 400, "detections_per_image"),
        ("model=sqares", 404, "no such model: 'sqares'; .* did you mean squares"),
    ],
)
def test_detect_invalid_option_is_named(
    service: TestClient, query: str, status: int, detail: str
) -> None:
    response = service.post(f"/v1/detect?{query}", content=png_image(), headers=PNG)
    assert response.status_code == status
    assert re.search(detail, response.json()["detail"]), response.json()


PART = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\na'
FORM = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    ("media_type", "content", "status", "detail"),
    [
        ("text/plain", b"hello", 415, "unsupported media type: 'text/plain'"),
        ("application/json", b'{"url": "http://example.com/a.png"}', 415, "multipart/form-data"),
        ("", png_image(), 415, "no Content-Type"),
        ("image/png", b"", 422, "empty request body"),
        ("multipart/form-data", b"", 400, "Missing boundary"),
        ("multipart/form-data; boundary=" + 300 * "x", b"", 400, "malformed"),
        (FORM, b"", 400, "ends before"),
        (FORM, b"--x--\r\n", 422, "holds no image"),
        (FORM, b"hello", 400, "malformed"),
        (FORM, PART, 400, "ends before"),
        (FORM, PART.replace(b"images", b"image") + b"\r\n--x--\r\n", 400, "did you mean images"),
        (FORM, PART.replace(b'; filename="a"', b"") + b"\r\n--x--\r\n", 400, "has no filename"),
        (FORM, b"--x\r\nContent-Type: image/png\r\n\r\na\r\n--x--\r\n", 400, '"name" must be'),
    ],
)
def test_detect_invalid_body_is_explained(
    service: TestClient, media_type: str, content: bytes, status: int, detail: str
) -> None:
    headers = {"Content-Type": media_type} if media_type else {}
    response = service.post("/v1/detect", content=content, headers=headers)
    assert (response.status_code, detail in response.json()["detail"]) == (status, True), (
        response.json()
    )


def test_detect_file_names_are_labels(service: TestClient) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="images"; filename="NAME"\r\n\r\n'
    body = part + png_image() + b"\r\n--x--\r\n"
    for sent, received in {
        b"../../etc/passwd": "../../etc/passwd",
        b"": "image_000000",
        b"a\x00\x1b[31m.png": "a\ufffd\ufffd[31m.png",
        400 * b"n": 255 * "n",
    }.items():
        content = body.replace(b"NAME", sent)
        response = service.post("/v1/detect", content=content, headers={"Content-Type": FORM})
        assert response.json()["images"][0]["file"] == received


def test_model_lists_the_selected_classes() -> None:
    detector = white_detector()
    detector.selected = (1,)
    detector.thresholds["score_thresholds"] = {"white": 0.4, "bright": 0.5}
    with client({"first": detector}) as service:
        (model,) = service.get("/v1/model").json()["models"]
    assert (model["classes"], model["category_ids"]) == (["bright"], [9])
    assert model["thresholds"]["score_thresholds"] == {"bright": 0.5}


def test_model_lists_several_models() -> None:
    first, second = white_detector(), white_detector()
    second.thresholds["score_threshold"] = 0.9
    metrics = {"AP": 0.5, "AP50": 0.75, "data": "squares", "split": "val"}
    with client({"first": first, "second": second}, metrics={"second": metrics}) as service:
        assert service.get("/v1/model").json()["models"][1]["milliseconds"] is None
        responses = [
            service.post(f"/v1/detect{query}", content=png_image(), headers=PNG).json()
            for query in ("", "?model=first", "?model=second")
        ]
        content = service.get("/v1/model").json()
    assert [response["model"] for response in responses] == ["first", "first", "second"]
    assert [len(r["images"][0]["detections"]) for r in responses] == [2, 2, 1]
    assert content["version"] == __version__
    limits = {"bytes": 33554432, "pixels": 50_000_000, "seconds": 60.0}
    assert content["limits"] == limits
    assert [model["default"] for model in content["models"]] == [True, False]
    assert [model["metrics"] for model in content["models"]] == [None, metrics]
    model = content["models"][1]
    assert (model["name"], model["classes"], model["category_ids"]) == (
        "second",
        ["white", "bright"],
        [7, 9],
    )
    assert (model["image_size"], model["max_size"]) == (64, 128)
    assert model["thresholds"]["score_threshold"] == 0.9
    assert model["network"] == "torch on cpu, float32"
    assert model["milliseconds"] > 0


def test_page_serves_its_files_only(service: TestClient) -> None:
    page = resources.files("retinanet.serve") / "page"
    response = service.get("/")
    assert response.content == (page / "index.html").read_bytes()
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    script = service.get("/page/page.js")
    assert script.content == (page / "page.js").read_bytes()
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert script.headers["cache-control"] == "no-cache"
    tag = {"If-None-Match": script.headers["etag"]}
    assert service.get("/page/page.js", headers=tag).status_code == 304
    for path in (
        *("/page/", "/page/nothing.js", "/page/..%2fapp.py", "/page/../app.py"),
        *("/page/%2e%2e/app.py", "/page//etc/passwd", "/docs", "/redoc", "/index.html"),
    ):
        response = service.get(path)
        assert (path, response.status_code) == (path, 404)
        assert response.json() == {"detail": "no such URL"}


@pytest.mark.parametrize("path", ["/", "/v1/model", "/nothing", "/healthz", "/v1/detect"])
def test_responses_have_security_headers(service: TestClient, path: str) -> None:
    headers = service.get(path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'self'"
    assert policy.pop("img-src") == "'self' blob: data:"
    assert set(policy.values()) == {"'none'"}
    assert headers["permissions-policy"] == "camera=(self), microphone=(), geolocation=()"
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def test_wrong_method_is_405(service: TestClient) -> None:
    response = service.get("/v1/detect")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json() == {"detail": "method not allowed: GET"}


def test_health_and_readiness() -> None:
    service = TestClient(build_app(white_detector()))  # without its startup
    paths = ("/healthz", "/readyz")
    assert [service.get(path).status_code for path in paths] == [503, 503]
    response = service.post("/v1/detect", content=png_image(), headers=PNG)
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    with service:
        assert [service.get(path).json() for path in paths] == 2 * [{"status": "ready"}]
    assert [service.get(path).status_code for path in paths] == [503, 503]


def test_network_failure_is_500_for_its_request_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    detector = white_detector()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret path")

    with client(detector) as service:
        with monkeypatch.context() as broken:
            broken.setattr(detector, "detect_prepared", fail)
            response = service.post("/v1/detect", content=png_image(), headers=PNG)
        assert response.status_code == 500
        assert response.json() == {"detail": "internal server error; see the log"}
        assert "content-security-policy" in response.headers
        assert "secret path" in caplog.text
        assert service.post("/v1/detect", content=png_image(), headers=PNG).status_code == 200
        assert 'status="500"} 1.0' in service.get("/metrics").text


@pytest.mark.parametrize("workers", [1, 2])
def test_network_failure_at_start_is_raised(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    detector = white_detector()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(detector, "detect_prepared", fail)
    app = build_app(detector, Settings(workers=workers))
    with pytest.raises(RuntimeError, match="no memory"):
        app.state.batcher.start()


def test_metrics() -> None:
    with client({"squares": white_detector()}) as service:
        service.post("/v1/detect", files=form(("a", png_image()), ("b", b"x")))
        service.post("/v1/detect?score=1", content=png_image(), headers=PNG)
        service.get("/page/theme.js")
        service.get("/random/path")
        service.request("BREW", "/v1/detect")
        response = service.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    for line in (
        'retinanet_requests_total{method="POST",route="/v1/detect",status="200"} 1.0',
        'retinanet_requests_total{method="POST",route="/v1/detect",status="400"} 1.0',
        'retinanet_requests_total{method="other",route="/v1/detect",status="405"} 1.0',
        'retinanet_requests_total{method="GET",route="/page/{name}",status="200"} 1.0',
        'retinanet_requests_total{method="GET",route="other",status="404"} 1.0',
        'retinanet_request_seconds_count{route="/v1/detect"} 3.0',
        'retinanet_images_total{model="squares"} 1.0',
        'retinanet_failed_images_total{model="squares"} 1.0',
        "retinanet_queue_images 0.0",
    ):
        assert line in response.text, line
    assert "random" not in response.text
    with client() as other:  # a second service in the process has its own metrics
        assert "/v1/detect" not in other.get("/metrics").text


def test_api_key_is_needed_except_for_page_and_health() -> None:
    settings = Settings(api_key="open sesame")
    assert "sesame" not in repr(settings)
    right = {"X-API-Key": "open sesame"}, {"Authorization": "Bearer open sesame"}
    wrong = [{"X-API-Key": key} for key in ("open", "", "emases nepo", "ö")]
    wrong += [{"Authorization": value} for value in ("Bearer x", "Basic open sesame")]
    with client(white_detector(), settings) as service:
        for path in ("/", "/healthz", "/readyz", "/page/theme.js"):
            assert service.get(path).status_code == 200, path
        for path in ("/v1/model", "/metrics", "/openapi.json"):
            assert service.get(path).status_code == 401, path
            for headers in right:
                assert service.get(path, headers=headers).status_code == 200, path
            for headers in wrong:
                encoded = {name: value.encode() for name, value in headers.items()}
                response = service.get(path, headers=encoded)
                assert response.status_code == 401, headers
                assert response.headers["www-authenticate"] == "Bearer"
                assert "sesame" not in response.text
        response = service.post("/v1/detect?score=1", content=png_image(), headers=PNG)
        assert (response.status_code, "missing" in response.json()["detail"]) == (401, True)
        schemes = service.get("/openapi.json", headers=right[0]).json()
    assert set(schemes["components"]["securitySchemes"]) == {"APIKeyHeader", "HTTPBearer"}


def test_openapi_describes_options_and_errors(service: TestClient) -> None:
    description = service.get("/openapi.json").json()
    assert set(description["paths"]) == {
        *("/v1/detect", "/v1/model", "/healthz", "/readyz", "/metrics")
    }
    detect = description["paths"]["/v1/detect"]["post"]
    assert set(detect["responses"]) == {
        *("200", "400", "404", "408", "413", "415", "422", "500", "503", "504"),
    }
    schemas = {parameter["name"]: parameter["schema"] for parameter in detect["parameters"]}
    assert schemas["model"]["enum"] == ["squares"]
    assert "null" not in json.dumps(schemas)
    assert "securitySchemes" not in description["components"]
    # The ranges of options are those of the recipes, except the maximum number of boxes.
    limits = DetectConfig.model_json_schema()["properties"]
    for name in ("score_threshold", "nms_threshold", "detections_per_image"):
        for key in ("minimum", "exclusiveMinimum", "exclusiveMaximum"):
            assert schemas[name].get(key) == limits[name].get(key), (name, key)


def test_responses_match_their_schemas(service: TestClient) -> None:
    documented = service.get("/openapi.json").json()["components"]["schemas"]
    files = form(("a.png", png_image()), ("b.png", b"x"))
    for response, model in (
        (service.post("/v1/detect", files=files), schema.DetectResponse),
        (service.get("/v1/model"), schema.ModelsResponse),
        (service.get("/readyz"), schema.Health),
        (service.get("/v1/detect"), schema.ErrorResponse),
    ):
        content = response.json()
        assert model.model_validate(content).model_dump(mode="json", by_alias=True) == content
        assert set(documented[model.__name__]["properties"]) == set(content)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (4, 1), (4, 3)])
def test_batches_return_the_detectors_results(batch_size: int, workers: int) -> None:
    detector = white_detector()
    files = [
        (f"{i}.png", png_image(96 + 32 * (i % 3), 96 + 16 * (i % 5), x=8 * (i % 7)))
        for i in range(24)
    ]
    options: list[dict[str, float]] = [{}, {"score_threshold": 0.9}]
    results = [expected(detector, *file, **options[i % 2]) for i, file in enumerate(files)]
    finder(detector).batches.clear()
    settings = Settings(batch_size=batch_size, workers=workers)
    with client(detector, settings) as service, ThreadPoolExecutor(24) as pool:
        batcher: Batcher = service.app.state.batcher  # type: ignore[attr-defined]
        finder(detector).gate.clear()

        def post(i: int) -> Any:
            return service.post("/v1/detect", params=options[i % 2], files=form(files[i])).json()

        responses = pool.map(post, range(24))
        wait_until(lambda: batcher.num_pending == 24)
        finder(detector).gate.set()
        contents = list(responses)
    # This network computes the same sums for any batch: results are equal to the last bit.
    assert [content["images"] for content in contents] == [[result] for result in results]
    sizes = {shape[0] for shape in finder(detector).batches}
    assert max(sizes) <= batch_size
    assert batch_size == 1 or max(sizes) > 1
    sides = {side for shape in finder(detector).batches for side in shape[2:]}
    assert all(side % 32 == 0 and 64 <= side <= 128 for side in sides)


def test_batch_has_one_size_and_starts_with_the_oldest_image() -> None:
    detector = white_detector()
    wide, high = png_image(64, 128), png_image(128, 64)  # (64, 128) and (128, 64) at the network
    settings = Settings(batch_size=4, workers=1)
    with client(detector, settings) as service, ThreadPoolExecutor(5) as pool:
        batcher: Batcher = service.app.state.batcher  # type: ignore[attr-defined]
        finder(detector).batches.clear()
        finder(detector).gate.clear()
        futures = []
        for i, data in enumerate((wide, high, wide, high, wide)):
            futures.append(pool.submit(service.post, "/v1/detect", content=data, headers=PNG))
            # The first is in the network, the others wait in this order.
            wait_until(lambda i=i: batcher.num_running == 1 and len(batcher._decoded) == i)
        finder(detector).gate.set()
        assert [future.result(120).status_code for future in futures] == 5 * [200]
    assert finder(detector).batches == [(1, 3, 64, 128), (2, 3, 128, 64), (2, 3, 64, 128)]


def test_lone_image_gets_all_cores_and_others_share_them() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        detector = white_detector()
        cores: list[int] = []
        finder(detector).register_forward_pre_hook(lambda *_: cores.append(torch.get_num_threads()))
        with client(detector, Settings()) as service, ThreadPoolExecutor(3) as pool:
            batcher: Batcher = service.app.state.batcher  # type: ignore[attr-defined]
            assert batcher.num_workers == 4
            cores.clear()
            finder(detector).gate.clear()
            futures = []
            for i in range(3):
                post = {"content": png_image(), "headers": PNG}
                futures.append(pool.submit(service.post, "/v1/detect", **post))
                wait_until(lambda i=i: len(cores) == i + 1)  # the image is in the network
            finder(detector).gate.set()
            assert cores == [4, 1, 1]
            assert [future.result(120).status_code for future in futures] == 3 * [200]
            assert service.post("/v1/detect", **post).status_code == 200
            assert cores == [4, 1, 1, 4]
        assert torch.get_num_threads() == 4  # of other threads
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small_network() -> Detector:
    checkpoint = Checkpoint(
        tiny_network(3, spread=True, prior=0.3), ("a", "b", "c"), (1, 2, 3), 64, 128
    )
    return Detector(checkpoint, device="cpu", precision="float32")


def test_batches_of_a_real_network_return_the_same(small_network: Detector) -> None:
    generator = torch.Generator().manual_seed(3)
    files = []
    for i in range(8):
        shape = (80 + 16 * (i % 2), 96, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "PNG")
        files.append((f"{i}.png", file.getvalue()))
    results = [expected(small_network, *file) for file in files]
    settings = Settings(batch_size=2, workers=2)
    with client(small_network, settings) as service, ThreadPoolExecutor(6) as pool:
        responses = list(
            pool.map(lambda file: service.post("/v1/detect", files=form(file)).json(), files)
        )
    for response, result in zip(responses, results, strict=True):
        detections = response["images"][0]["detections"]
        assert len(detections) == len(result["detections"]) > 20
        # A batch is summed in another order, so float32 rounds differently. Boxes are in pixels.
        for ours, reference in zip(detections, result["detections"], strict=True):
            assert ours["score"] == pytest.approx(reference["score"], abs=1e-4)
        best, reference = detections[0], result["detections"][0]
        assert best["class"] == reference["class"]
        assert best["box"] == pytest.approx(reference["box"], abs=1e-2)


def test_build_app_rejects_workers_for_other_backends(small_network: Detector) -> None:
    other = white_detector()
    other.network.backend = "openvino"
    with pytest.raises(ConfigError, match="leave --workers at 1"):
        build_app({"a": small_network, "b": other}, Settings(workers=2))


def test_build_app_without_a_model_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no model to serve"):
        build_app({})


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "prometheus_client" else find_spec(name),
    )
    with pytest.raises(MissingExtraError, match=r"^prometheus-client .*retinanet\[serve\]"):
        build_app(white_detector())


def test_import_of_the_package_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("retinanet.serve")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("fastapi", "starlette", "uvicorn", "prometheus_client", "python_multipart"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    assert importlib.import_module("retinanet.serve").Settings().workers is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": 0}, "--max-bytes is out of range: 0; minimum 1"),
        ({"timeout": 0}, "--timeout is out of range: 0"),
        ({"timeout": float("nan")}, "--timeout is out of range: nan"),
        ({"workers": 0}, "--workers is out of range: 0; minimum 1"),
        ({"api_key": ""}, "invalid API key"),
        ({"api_key": "a\nb"}, "invalid API key"),
        ({"api_key": "key "}, "ends with a space"),
    ],
)
def test_settings_out_of_range_are_errors(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Settings(**options)
    assert "a\nb" not in str(caught.value)


def test_command_line_shows_the_defaults_of_the_settings() -> None:
    for option in dataclasses.fields(ServiceOptions):
        if option.name in ("queue", "max_bytes", "max_pixels", "timeout"):
            shown = option.metadata["show_default"]
            assert shown == f"{getattr(Settings(), option.name):,.0f}", option.name
    assert ServiceOptions().workers == Settings().workers


def test_model_names(tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    file.write_bytes(b"")
    names = {
        "bccd": "runs/bccd",
        "cells": "runs/cells/best",
        "nuclei": "runs/nuclei/last/model.safetensors",
        "retinanet_resnet50_fpn_v2": "torchvision/retinanet_resnet50_fpn_v2",
        "name": "hf://owner/name",
        "net": str(file),
        "trailing": "runs/trailing/",
    }
    assert model_names(list(names.values())) == names
    assert model_names(["old=runs/bccd/last"]) == {"old": "runs/bccd/last"}
    with pytest.raises(ConfigError, match="two models named bccd"):
        model_names(["runs/bccd", "other/bccd"])
    with pytest.raises(ConfigError, match="model without a name"):
        model_names(["=runs/bccd"])


def test_model_metrics_prefer_the_test_split(tmp_path: Path) -> None:
    run = tmp_path / "cells"
    (run / "best").mkdir(parents=True)
    assert model_metrics(str(run)) is None
    (run / "config.toml").write_text("")
    assert model_metrics(str(run)) is None
    (run / "metrics.json").write_text('{"ap": 0.25, "ap50": 0.5}')
    trained = {"AP": 0.25, "AP50": 0.5, "data": None, "split": "val"}
    assert model_metrics(str(run)) == model_metrics(str(run / "best")) == trained
    (run / "run.json").write_text('{"data": "/home/somebody/cells"}')
    assert model_metrics(str(run)) == trained | {"data": "cells"}
    (run / "evaluation" / "test").mkdir(parents=True)
    file = run / "evaluation" / "test" / "metrics.json"
    file.write_text('{"ap": 0.125, "ap50": null}')
    tested = {"AP": 0.125, "AP50": None, "data": "cells", "split": "test"}
    assert model_metrics(str(run)) == tested
    file.write_text("broken")
    assert model_metrics(str(run)) == trained | {"data": "cells"}
    assert model_metrics("torchvision/retinanet_resnet50_fpn_v2") is None
