"""The service: each address, its answers, and that they are the detector's own."""

from __future__ import annotations

import hmac
import importlib
import importlib.util
import inspect
import io
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, get_type_hints

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from small_service import client, finder, png_image, running, wait_until, white_detector
from torch import nn

from retinanet import __version__
from retinanet.cli.serve import serve as serve_command
from retinanet.config import DetectConfig
from retinanet.errors import ConfigError, MissingExtraError
from retinanet.inference import Detector, Source
from retinanet.model.checkpoint import Checkpoint
from retinanet.model.retinanet import RetinaNet
from retinanet.serve import Settings, build_app
from retinanet.serve.batching import Batcher
from retinanet.serve.models import judged, model_names

PNG = {"Content-Type": "image/png"}


def files(*given: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", one) for one in given]


def said(detector: Detector, name: str, data: bytes, **thresholds: Any) -> dict[str, Any]:
    """What the detector itself says of an image."""
    [found] = detector.stream([Source(data, name)], **thresholds)
    return found.to_dict()


def test_images_of_a_form_come_back_in_order() -> None:
    detector = white_detector()
    with client({"squares": detector}) as one:
        given = [
            ("b.png", png_image(x=48)),
            ("sub/a.png", png_image(96, 96)),
            ("ü.png", png_image()),
        ]
        answer = one.post("/v1/detect", files=files(*given))
    assert answer.status_code == 200
    assert answer.json()["model"] == "squares"
    assert answer.json()["failures"] == []
    assert answer.json()["images"] == [said(detector, name, data) for name, data in given]
    # By hand: the square lies at (48, 16), 16 pixels wide.
    first = answer.json()["images"][0]
    assert (first["file"], first["height"], first["width"]) == ("b.png", 128, 192)
    assert first["detections"][0]["box"] == [48, 16, 64, 32]
    assert [one["class"] for one in first["detections"]] == ["white", "bright"]
    assert [one["category_id"] for one in first["detections"]] == [7, 9]
    times = answer.json()["milliseconds"]
    assert times["total"] >= times["network"] > 0
    assert times["queue"] >= 0


def test_a_body_is_one_image() -> None:
    detector = white_detector()
    with client(detector) as one:
        answer = one.post("/v1/detect", content=png_image(), headers=PNG)
    assert answer.json()["model"] == "model"
    assert answer.json()["images"] == [said(detector, "image", png_image())]


def test_images_without_names_are_numbered() -> None:
    boundary = "x"
    part = b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\n' + png_image() + b"\r\n"
    with client(white_detector()) as one:
        answer = one.post(
            "/v1/detect",
            content=2 * part + b"--x--\r\n",
            headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
        )
    assert [one["file"] for one in answer.json()["images"]] == ["image_000000", "image_000001"]


def test_one_broken_image_stops_no_other() -> None:
    good, cut = png_image(), png_image()[:60]
    with client(white_detector()) as one:
        answer = one.post(
            "/v1/detect", files=files(("a", good), ("cut", cut), ("b", good), ("no", b""))
        )
    assert answer.status_code == 200
    assert [one["file"] for one in answer.json()["images"]] == ["a", "b"]
    assert [one["file"] for one in answer.json()["failures"]] == ["cut", "no"]
    reasons = [one["reason"] for one in answer.json()["failures"]]
    assert "cannot be read" in reasons[0]
    assert reasons[1] == "the file is empty"


@pytest.mark.parametrize(
    ("given", "detail"),
    [
        ([("cut.png", png_image()[:60])], "cut.png: cannot be read"),
        ([("a.txt", b"hello")], "a.txt: it is no image that is taken"),
        ([("a.txt", b"hello"), ("b.png", b"")], "a.txt: it is no image .* \\(and 1 more\\)"),
        (
            [("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")],
            "a.eps: it is no image that is taken",
        ),
    ],
)
def test_nothing_but_broken_images_is_a_422(given: Any, detail: str) -> None:
    with client(white_detector()) as one:
        answer = one.post("/v1/detect", files=files(*given))
    assert answer.status_code == 422
    assert answer.json().keys() == {"detail"}
    assert re.match(detail, answer.json()["detail"]), answer.json()
    assert "bytes of an image" not in answer.json()["detail"]
    assert "/" not in answer.json()["detail"]


def test_options_reach_the_search() -> None:
    detector = white_detector()
    with client(detector) as one:
        for query, options in {
            "score_threshold=0.9": {"score_threshold": 0.9},
            "class_agnostic=true": {"class_agnostic_nms": True},
            "detections_per_image=1": {"detections_per_image": 1},
            "nms_threshold=0.1&score_threshold=0": {"nms_threshold": 0.1, "score_threshold": 0.0},
        }.items():
            answer = one.post(f"/v1/detect?{query}", content=png_image(), headers=PNG)
            assert answer.json()["images"] == [said(detector, "image", png_image(), **options)]
    assert len(said(detector, "image", png_image())["detections"]) == 2
    assert len(said(detector, "image", png_image(), score_threshold=0.9)["detections"]) == 1


@pytest.mark.parametrize(
    ("query", "status", "detail"),
    [
        ("score_treshold=.5", 400, "did you mean score_threshold"),
        ("score_threshold=1", 400, "option score_threshold should be less than 1, got '1'"),
        ("score_threshold=nan", 400, "score_threshold"),
        ("score_threshold=high", 400, "score_threshold should be a valid number"),
        ("nms_threshold=0", 400, "nms_threshold should be greater than 0"),
        ("class_agnostic=perhaps", 400, "class_agnostic should be a valid boolean"),
        ("detections_per_image=0", 400, "detections_per_image should be greater than or equal"),
        ("detections_per_image=99999999999999999999", 400, "detections_per_image"),
        ("model=sqares", 404, "did you mean squares"),
    ],
)
def test_options_that_are_not_understood(query: str, status: int, detail: str) -> None:
    with client({"squares": white_detector()}) as one:
        answer = one.post(f"/v1/detect?{query}", content=png_image(), headers=PNG)
    assert answer.status_code == status
    assert detail in answer.json()["detail"]


@pytest.mark.parametrize(
    ("kind", "content", "status", "detail"),
    [
        ("text/plain", b"hello", 415, "got 'text/plain'"),
        ("application/json", b'{"url": "http://example.com/a.png"}', 415, "multipart/form-data"),
        ("", png_image(), 415, "no Content-Type"),
        ("image/png", b"", 422, "its body is empty"),
        ("multipart/form-data", b"", 400, "no boundary"),
        ("multipart/form-data; boundary=" + 300 * "x", b"", 400, "broken"),
        ("multipart/form-data; boundary=x", b"", 400, "ends before"),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 422, "no image"),
        ("multipart/form-data; boundary=x", b"hello", 400, "broken"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\na\r\n--x--\r\n',
            400,
            "did you mean images",
        ),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\nContent-Type: image/png\r\n\r\na\r\n--x--\r\n",
            400,
            "unknown form field ''",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\na',
            400,
            "ends before",
        ),
    ],
)
def test_bodies_that_are_not_understood(
    kind: str, content: bytes, status: int, detail: str
) -> None:
    with client(white_detector()) as one:
        headers = {"Content-Type": kind} if kind else {}
        answer = one.post("/v1/detect", content=content, headers=headers)
    assert (answer.status_code, detail in answer.json()["detail"]) == (status, True), answer.json()


def test_names_are_labels_and_nothing_else() -> None:
    part = (
        b'--x\r\nContent-Disposition: form-data; name="images"; filename="%s"\r\n\r\n'
        + png_image().replace(b"%", b"%%")
        + b"\r\n--x--\r\n"
    )
    with client(white_detector()) as one:
        for given, got in {
            b"../../etc/passwd": "../../etc/passwd",
            b"a\x00\x1b[31m.png": "a��[31m.png",
            b"\xff.png": "�.png",
            400 * b"n": 255 * "n",
        }.items():
            answer = one.post(
                "/v1/detect",
                content=part % given,
                headers={"Content-Type": "multipart/form-data; boundary=x"},
            )
            assert answer.json()["images"][0]["file"] == got


def test_two_models() -> None:
    first, second = white_detector(), white_detector()
    second.thresholds["score_threshold"] = 0.9
    known = {"AP": 0.5, "AP50": 0.75, "data": "squares", "split": "val"}
    with client({"first": first, "second": second}, judged={"second": known}) as one:
        answers = [
            one.post(f"/v1/detect{query}", content=png_image(), headers=PNG).json()
            for query in ("", "?model=first", "?model=second")
        ]
        told = one.get("/v1/model").json()
    assert [answer["model"] for answer in answers] == ["first", "first", "second"]
    assert [len(answer["images"][0]["detections"]) for answer in answers] == [2, 2, 1]
    assert told["version"] == __version__
    assert told["limits"] == {
        "bytes": 33554432,
        "pixels": 50_000_000,
        "images": 32,
        "seconds": 60.0,
    }
    assert [one["name"] for one in told["models"]] == ["first", "second"]
    assert [one["default"] for one in told["models"]] == [True, False]
    assert [one["metrics"] for one in told["models"]] == [None, known]
    described = told["models"][1]
    assert described["classes"] == ["white", "bright"]
    assert described["category_ids"] == [7, 9]
    assert (described["image_size"], described["max_size"]) == (64, 128)
    assert described["thresholds"]["score_threshold"] == 0.9
    assert described["network"] == "torch on cpu, float32"
    assert described["milliseconds"] > 0


def test_a_model_that_nobody_asked_has_no_speed() -> None:
    with client(white_detector()) as one:
        assert one.get("/v1/model").json()["models"][0]["milliseconds"] is None
        assert one.get("/v1/model?x=1").status_code == 400


def test_the_page_and_nothing_beside_it() -> None:
    with client(white_detector()) as one:
        answer = one.get("/")
        page = resources.files("retinanet.serve") / "page"
        assert answer.content == (page / "index.html").read_bytes()
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        script = next(file.name for file in page.iterdir() if file.name.endswith(".js"))
        asset = one.get(f"/page/{script}")
        assert asset.content == (page / script).read_bytes()
        assert asset.headers["content-type"] == "text/javascript; charset=utf-8"
        tag = {"If-None-Match": asset.headers["etag"]}
        assert one.get(f"/page/{script}", headers=tag).status_code == 304
        for address in (
            "/page/",
            "/page/nothing.js",
            "/page/..%2fapp.py",
            "/page/../app.py",
            "/page/%2e%2e/app.py",
            "/page//etc/passwd",
            "/docs",
            "/redoc",
            "/index.html",
        ):
            answer = one.get(address)
            assert (address, answer.status_code) == (address, 404)
            assert answer.json() == {"detail": "there is nothing at this address"}


@pytest.mark.parametrize("address", ["/", "/v1/model", "/nothing", "/healthz", "/v1/detect"])
def test_every_answer_has_the_headers_of_safety(address: str) -> None:
    with client(white_detector()) as one:
        headers = one.get(address).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'self'"
    assert policy.pop("img-src") == "'self' blob: data:"
    assert set(policy.values()) == {"'none'"}
    assert headers["permissions-policy"] == "camera=(self), microphone=(), geolocation=()"
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def test_a_method_that_an_address_has_not() -> None:
    with client(white_detector()) as one:
        answer = one.get("/v1/detect")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert answer.json() == {"detail": "GET is not for this address"}


def test_health_and_readiness() -> None:
    detector = white_detector()
    finder(detector).open.clear()
    app = build_app(detector)
    with TestClient(app) as one:
        assert one.get("/healthz").json() == {"status": "alive"}
        answer = one.get("/readyz")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        busy = one.post("/v1/detect", content=png_image(), headers=PNG)
        assert (busy.status_code, "starting" in busy.json()["detail"]) == (503, True)
        finder(detector).open.set()
        wait_until(lambda: app.state.batcher.warm)
        assert one.get("/readyz").json() == {"status": "ready"}
        app.state.stopping = True
        assert one.get("/readyz").status_code == 503
        assert one.get("/healthz").status_code == 200


def test_a_thread_that_has_ended_is_no_health(monkeypatch: pytest.MonkeyPatch) -> None:
    with client(white_detector()) as one:
        monkeypatch.setattr(Batcher, "alive", False)
        answer = one.get("/healthz")
    assert answer.status_code == 503
    assert "restart" in answer.json()["detail"]


def test_a_network_that_fails_is_a_500_and_the_next_image_is_searched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    detector = white_detector()
    with client(detector) as one:
        with monkeypatch.context() as broken:

            def fail(*_: Any, **__: Any) -> None:
                raise RuntimeError("secret place")

            broken.setattr(detector, "detect_prepared", fail)
            answer = one.post("/v1/detect", content=png_image(), headers=PNG)
        assert answer.status_code == 500
        assert answer.json() == {"detail": "the server failed; its log says where"}
        assert "content-security-policy" in answer.headers
        assert "secret place" in caplog.text
        assert one.post("/v1/detect", content=png_image(), headers=PNG).status_code == 200
        assert 'retinanet_failures_total{reason="internal"} 1.0' in one.get("/metrics").text


def test_a_network_that_fails_from_the_start_is_told() -> None:
    detector = white_detector()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    detector.detect_prepared = fail  # type: ignore[method-assign]
    app = build_app(detector, Settings(workers=2))
    with TestClient(app) as one:
        wait_until(lambda: app.state.batcher.failed is not None)
        assert str(app.state.batcher.failed) == "no memory"
        assert one.get("/readyz").status_code == 503


def test_metrics() -> None:
    with client({"squares": white_detector()}) as one:
        one.post("/v1/detect", files=files(("a", png_image()), ("b", b"x")))
        one.post("/v1/detect?score=1", content=png_image(), headers=PNG)
        one.get("/page/theme.js")
        one.get("/random/address")
        one.request("BREW", "/v1/detect")
        answer = one.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.text
    for line in (
        'retinanet_requests_total{method="POST",route="/v1/detect",status="200"} 1.0',
        'retinanet_requests_total{method="POST",route="/v1/detect",status="400"} 1.0',
        'retinanet_requests_total{method="other",route="/v1/detect",status="405"} 1.0',
        'retinanet_requests_total{method="GET",route="/page/{name}",status="200"} 1.0',
        'retinanet_requests_total{method="GET",route="other",status="404"} 1.0',
        'retinanet_request_seconds_count{route="/v1/detect"} 3.0',
        'retinanet_failures_total{reason="unreadable"} 1.0',
        'retinanet_failures_total{reason="option"} 1.0',
        'retinanet_failures_total{reason="busy"} 0.0',
        "retinanet_batch_images_count 1.0",
        'retinanet_images_total{model="squares"} 1.0',
        "retinanet_queue_images 0.0",
    ):
        assert line in text, line
    assert "random" not in text
    # Two services in one process count each for itself.
    with client(white_detector()) as other:
        assert "retinanet_batch_images_count 0.0" in other.get("/metrics").text


def test_the_key() -> None:
    settings = Settings(api_key="open sesame")
    assert "sesame" not in repr(settings)
    with client(white_detector(), settings) as one:
        for address in ("/", "/healthz", "/readyz", "/page/theme.js"):
            assert one.get(address).status_code == 200, address
        for address in ("/v1/model", "/metrics", "/openapi.json"):
            assert one.get(address).status_code == 401, address
            for headers in (
                {"X-API-Key": "open sesame"},
                {"Authorization": "Bearer open sesame"},
            ):
                assert one.get(address, headers=headers).status_code == 200, address
            for headers in (
                {"X-API-Key": "open"},
                {"X-API-Key": ""},
                {"X-API-Key": "open sesame "[::-1]},
                {"Authorization": "Bearer x"},
                {"Authorization": "Basic open sesame"},
                {"X-API-Key": "ö"},
            ):
                encoded = {name: value.encode() for name, value in headers.items()}
                answer = one.get(address, headers=encoded)
                assert answer.status_code == 401, headers
                assert answer.headers["www-authenticate"] == "Bearer"
                assert "sesame" not in answer.text
        missing = one.post("/v1/detect?score=1", content=png_image(), headers=PNG)
        assert missing.status_code == 401
        assert "is missing" in missing.json()["detail"]
        schemes = one.get("/openapi.json", headers={"X-API-Key": "open sesame"}).json()
    assert set(schemes["components"]["securitySchemes"]) == {"APIKeyHeader", "HTTPBearer"}


def test_the_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    whole = hmac.compare_digest
    monkeypatch.setattr(
        hmac,
        "compare_digest",
        lambda a, b: asked.append((a, b)) or whole(a, b),  # type: ignore[func-returns-value]
    )
    with client(white_detector(), Settings(api_key="key")) as one:
        one.get("/v1/model", headers={"X-API-Key": "kez"})
    assert asked == [(b"kez", b"key")]


def test_the_description() -> None:
    with client({"squares": white_detector()}) as one:
        told = one.get("/openapi.json").json()
    assert set(told["paths"]) == {"/v1/detect", "/v1/model", "/healthz", "/readyz", "/metrics"}
    detect = told["paths"]["/v1/detect"]["post"]
    assert set(detect["responses"]) == {
        *("200", "400", "403", "404", "408", "413", "415", "422", "500", "503", "504"),
    }
    names = {one["name"]: one["schema"] for one in detect["parameters"]}
    assert names["model"]["enum"] == ["squares"]
    assert "null" not in json.dumps(names)
    assert "securitySchemes" not in told["components"]
    # Limits of options are those of the recipes, but for the number of boxes.
    limits = DetectConfig.model_json_schema()["properties"]
    for name in ("score_threshold", "nms_threshold", "detections_per_image"):
        for key in ("minimum", "exclusiveMinimum", "exclusiveMaximum"):
            assert names[name].get(key) == limits[name].get(key), (name, key)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (4, 1), (4, 3)])
def test_many_at_once_get_what_the_detector_says(batch_size: int, workers: int) -> None:
    detector = white_detector()
    given = [
        (f"{i}.png", png_image(96 + 32 * (i % 3), 96 + 16 * (i % 5), x=8 * (i % 7)))
        for i in range(24)
    ]
    expected = [said(detector, *one) for one in given]
    queries = ["", "?score_threshold=0.9"]
    strict = [said(detector, *one, score_threshold=0.9) for one in given]
    finder(detector).batches.clear()
    settings = Settings(batch_size=batch_size, workers=workers, max_wait_ms=5)
    finder(detector).batches.clear()
    with client(detector, settings) as one, ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(
                lambda i: one.post(f"/v1/detect{queries[i % 2]}", files=files(given[i])).json(),
                range(24),
            )
        )
    for i, answer in enumerate(answers):
        # This network does the same sums whatever the batch: equal to the last bit.
        assert answer["images"] == [(strict if i % 2 else expected)[i]]
    sizes = {shape[0] for shape in finder(detector).batches}
    assert max(sizes) <= batch_size
    assert batch_size == 1 or max(sizes) > 1
    # Nothing is padded beyond a multiple of 32: 64 pixels the shorter side, 128 the longer at most.
    assert {tuple(side % 32 for side in shape[2:]) for shape in finder(detector).batches} == {
        (0, 0)
    }


def test_a_batch_is_of_one_size_and_the_oldest_goes_first() -> None:
    detector = white_detector()
    wide, high = png_image(64, 128), png_image(128, 64)  # (64, 128) and (128, 64) at the network
    with client(detector, Settings(batch_size=4)) as one, ThreadPoolExecutor(5) as pool:
        batcher: Batcher = one.app.state.batcher  # type: ignore[attr-defined]
        finder(detector).batches.clear()
        finder(detector).open.clear()
        asked = []
        for i, data in enumerate((wide, high, wide, high, wide)):
            asked.append(pool.submit(one.post, "/v1/detect", content=data, headers=PNG))
            # The first is at the network, the others wait in this order.
            wait_until(lambda i=i: batcher._at_network == 1 and len(batcher._ready) == i)
        finder(detector).open.set()
        assert [answer.result(120).status_code for answer in asked] == 5 * [200]
    assert finder(detector).batches == [(1, 3, 64, 128), (2, 3, 128, 64), (2, 3, 64, 128)]


@pytest.fixture(scope="module")
def small_network() -> Detector:
    torch.manual_seed(0)
    model = RetinaNet(backbone="resnet18", num_classes=3, channels=16, head_depth=1, norm="group")
    for head in (model.class_head, model.box_head):
        for parameter in head.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)
    checkpoint = Checkpoint(model, ("a", "b", "c"), (1, 2, 3), 64, 128)
    return Detector(checkpoint, device="cpu", precision="float32")


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (4, 1), (2, 2)])
def test_a_real_network_in_batches_says_the_same(
    small_network: Detector, batch_size: int, workers: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    given = []
    for i in range(12):
        shape = (80 + 16 * (i % 2), 96, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "PNG")
        given.append((f"{i}.png", file.getvalue()))
    expected = [said(small_network, *one) for one in given]
    settings = Settings(batch_size=batch_size, workers=workers, max_wait_ms=20)
    with client(small_network, settings) as one, ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda i: one.post("/v1/detect", files=files(given[i])).json(), range(12))
        )
    for answer, image in zip(answers, expected, strict=True):
        got = answer["images"][0]
        assert len(got["detections"]) == len(image["detections"]) > 20
        # A batch is summed in another order: float32 rounds otherwise. Boxes are in pixels.
        for mine, theirs in zip(got["detections"], image["detections"], strict=True):
            assert mine["score"] == pytest.approx(theirs["score"], abs=1e-4)
        best, other = got["detections"][0], image["detections"][0]
        assert best["class"] == other["class"]
        assert best["box"] == pytest.approx(other["box"], abs=1e-2)


def test_workers_are_for_torch_on_a_cpu(small_network: Detector) -> None:
    other = white_detector()
    other.network.backend = "openvino"
    with pytest.raises(ConfigError, match="leave --workers at 1"):
        build_app({"a": small_network, "b": other}, Settings(workers=2))


def test_there_must_be_a_model() -> None:
    with pytest.raises(ConfigError, match="no model"):
        build_app({})


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("fastapi", "fastapi"),
        ("uvicorn", "uvicorn"),
        ("prometheus_client", "prometheus-client"),
        ("python_multipart", "python-multipart"),
    ],
)
def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else known(name)
    )
    with pytest.raises(MissingExtraError, match=rf"^{package} .*retinanet\[serve\]"):
        build_app(white_detector())


def test_importing_the_package_imports_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("retinanet.serve")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("fastapi", "starlette", "uvicorn", "prometheus_client", "python_multipart"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    assert importlib.import_module("retinanet.serve").Settings().workers == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_bytes": 0}, "--max-bytes 0 is under 1"),
        ({"max_wait_ms": -1}, "--max-wait-ms -1 is under 0"),
        ({"timeout": 0}, "--timeout 0 is not over 0 seconds"),
        ({"timeout": float("nan")}, "--timeout nan"),
        ({"workers": 0}, "--workers 0 is under 1"),
        ({"queue": 31}, "--queue 31 is under --max-images 32"),
        ({"held_bytes": 5}, "is under max_bytes"),
        ({"api_key": ""}, "the API key is empty"),
        ({"api_key": "a\nb"}, "the API key is empty"),
        ({"api_key": "key "}, "ends with a space"),
    ],
)
def test_settings_out_of_range(options: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        Settings(**options)
    assert "a\nb" not in str(caught.value)


def test_the_command_line_shows_the_settings_own_defaults() -> None:
    shown = {
        name: hint.__metadata__[0].show_default
        for name, hint in get_type_hints(serve_command, include_extras=True).items()
        if name != "return"
    }
    for name in ("queue", "max_bytes", "max_pixels", "max_images", "timeout", "max_wait_ms"):
        assert shown[name] == f"{getattr(Settings(), name):,.0f}", name
    assert inspect.signature(serve_command).parameters["workers"].default == Settings().workers


def test_names_of_models(tmp_path: Any) -> None:
    file = tmp_path / "net.onnx"
    file.write_bytes(b"")
    given = [
        "runs/bccd",
        "runs/cells/best",
        "runs/nuclei/last/model.safetensors",
        "torchvision/retinanet_resnet50_fpn_v2",
        "hf://owner/name",
        "old=runs/bccd/last",
        str(file),
        "runs/trailing/",
    ]
    assert list(model_names(given).items()) == [
        ("bccd", "runs/bccd"),
        ("cells", "runs/cells/best"),
        ("nuclei", "runs/nuclei/last/model.safetensors"),
        ("retinanet_resnet50_fpn_v2", "torchvision/retinanet_resnet50_fpn_v2"),
        ("name", "hf://owner/name"),
        ("old", "runs/bccd/last"),
        ("net", str(file)),
        ("trailing", "runs/trailing/"),
    ]
    with pytest.raises(ConfigError, match="would both be called bccd"):
        model_names(["runs/bccd", "other/bccd"])
    with pytest.raises(ConfigError, match="needs a name"):
        model_names(["=runs/bccd"])


def test_how_good_a_model_is(tmp_path: Any) -> None:
    run = tmp_path / "cells"
    (run / "best").mkdir(parents=True)
    assert judged(str(run)) is None
    (run / "config.toml").write_text("")
    assert judged(str(run)) is None
    (run / "metrics.json").write_text('{"ap": 0.25, "ap50": 0.5}')
    expected = {"AP": 0.25, "AP50": 0.5, "data": None, "split": "val"}
    assert judged(str(run)) == judged(str(run / "best")) == expected
    (run / "run.json").write_text('{"data": "/home/somebody/cells"}')
    assert judged(str(run)) == expected | {"data": "cells"}
    (run / "evaluation" / "test").mkdir(parents=True)
    file = run / "evaluation" / "test" / "metrics.json"
    file.write_text('{"ap": 0.125, "ap50": null}')
    assert judged(str(run)) == {"AP": 0.125, "AP50": None, "data": "cells", "split": "test"}
    file.write_text("broken")
    assert judged(str(run)) == expected | {"data": "cells"}
    assert judged("torchvision/retinanet_resnet50_fpn_v2") is None


def test_a_service_over_a_socket() -> None:
    detector = white_detector()
    with (
        running(detector) as one,
        httpx.Client(base_url=f"http://127.0.0.1:{one.port}", timeout=120) as line,
    ):
        answer = line.post("/v1/detect", files=files(("a.png", png_image())))
        assert answer.json()["images"] == [said(detector, "a.png", png_image())]
        assert "server" not in answer.headers
        assert line.get("/readyz").status_code == 200
