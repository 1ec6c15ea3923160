"""The OpenAPI description is true: schemathesis asks what it allows, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from small_service import png_image, running

from retinanet.serve import Settings

KEY = {"X-API-Key": "open sesame"}

# What is no image is a 422, however well it follows the description: it is described as bytes.
IMAGES = st.sampled_from(
    [png_image(), png_image(64, 64, "JPEG"), png_image(40, 300, "WEBP"), png_image(100, 90, "GIF")]
)
schemathesis.openapi.format("binary", IMAGES)
schemathesis.openapi.media_type("image/*", IMAGES)

REFUSALS = ["400", "401", "404", "413", "415", "422"]  # too many images are a 413


@pytest.fixture(scope="module")
def api() -> Iterator[Any]:
    with running(settings=Settings(api_key=KEY["X-API-Key"])) as one:
        yield schemathesis.openapi.from_url(
            f"http://127.0.0.1:{one.port}/openapi.json",
            headers=KEY,
            config=schemathesis.Config.from_dict(
                {"checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}}}
            ),
        )


ADDRESSES = [
    ("/v1/detect", "post"),
    ("/v1/model", "get"),
    ("/healthz", "get"),
    ("/readyz", "get"),
    ("/metrics", "get"),
]


def test_openapi_lists_every_route(api: Any) -> None:
    known = {(one.ok().path, one.ok().method.lower()) for one in api.get_all_operations()}
    assert known == set(ADDRESSES)


@pytest.mark.parametrize(
    ("address", "method", "mode"),
    [
        *((*one, GenerationMode.POSITIVE) for one in ADDRESSES),
        # The others take nothing that could be wrong.
        ("/v1/detect", "post", GenerationMode.NEGATIVE),
    ],
)
def test_responses_match_openapi(api: Any, address: str, method: str, mode: GenerationMode) -> None:
    operation = api[address][method]
    asked = []

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=20 if address == "/v1/detect" else 3,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        asked.append(case.call_and_validate(headers=KEY).status_code)

    ask()
    assert asked
    if mode == GenerationMode.POSITIVE:
        assert set(asked) == {200}
    else:
        assert 400 in asked


def test_errors_match_openapi(api: Any) -> None:
    base = api.get_base_url().rstrip("/")
    kind = {"Content-Type": "image/png"}
    with httpx.Client(base_url=base, headers=KEY, timeout=120) as line:
        answers = [
            line.post("/v1/detect?model=none", content=png_image(), headers=kind),
            line.post("/v1/detect?score=1", content=png_image(), headers=kind),
            line.post("/v1/detect", content=b"x", headers=kind),
            line.post("/v1/detect", content=b"x"),
            line.post("/v1/detect", content=bytes(34_000_000), headers=kind),
            httpx.post(f"{base}/v1/detect", content=png_image(), headers=kind, timeout=120),
        ]
    assert [one.status_code for one in answers] == [404, 400, 422, 415, 413, 401]
    operation = api["/v1/detect"]["post"]
    for answer in answers:
        operation.validate_response(answer)
        assert answer.json().keys() == {"detail"}
