"""Errors are explained on the page, and the page continues when it can."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_driver import KEY, RED, PageDriver

Draw = Callable[..., Path]
OpenPage = Callable[..., PageDriver]

DETECT = "**/v1/detect*"


def enter_key(driver: PageDriver, key: str = KEY) -> None:
    driver.page.wait_for_selector("#key-dialog[open]")
    driver.page.fill("#key", key)
    driver.page.keyboard.press("Enter")


def test_broken_image_is_explained(failing: PageDriver, draw: Draw, tmp_path: Path) -> None:
    whole = draw("whole.png", (8, 8, RED))
    broken = tmp_path / "broken.png"
    broken.write_bytes(whole.read_bytes()[:60])
    failing.upload(broken)
    text = failing.text(".stage-message")
    assert text.startswith("The image cannot be read: ")
    assert text.count("cannot be read") == 1
    assert failing.states() == ["failed"]
    assert "1 failed" in failing.text("#progress-text")
    failing.wait_for_announcement("broken.png: The image cannot be read: ")
    failing.upload(whole)
    assert failing.states() == ["failed", "1"]
    assert failing.page.is_visible(".stage-message") is False


def test_every_status_is_explained(failing: PageDriver, draw: Draw) -> None:
    texts = {
        400: "The server rejected the request: Because.",
        404: "The server does not know this model: Because.",
        408: "The upload took too long: Because.",
        413: "The image is too large for this server: Because.",
        415: "The server does not accept this type of file: Because.",
        422: "The image cannot be read: Because.",
        500: "The server failed on this image: Because.",
        504: "The server took too long for this image: Because.",
        418: "The server responded with status 418: Because.",
    }
    statuses = iter(texts)
    failing.page.route(
        DETECT,
        lambda route: route.fulfill(status=next(statuses), json={"detail": "image: Because."}),
    )
    failing.upload(draw("one.png", (8, 8, RED)))
    for status, text in texts.items():
        assert failing.text(".stage-message") == f"{text} Try again"
        if status == 418:
            failing.page.unroute(DETECT)
        failing.page.click(".stage-message button")
        failing.settle()
        failing.wait()
    assert failing.states() == ["1"]


def test_invalid_responses_are_explained(failing: PageDriver, draw: Draw) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"body": "<html>Bad gateway</html>", "status": 502}, "status 502"),
        ({"body": "hello"}, "The response is not JSON."),
        ({"json": {"images": []}}, "The response contains no image."),
    ]
    responses = iter(cases)
    failing.page.route(DETECT, lambda route: route.fulfill(**next(responses)[0]))
    for i, (_, text) in enumerate(cases):
        failing.upload(draw(f"{i}.png", (8, 8, RED)))
        assert text in failing.text(".stage-message")


def test_images_over_the_limits_are_explained(
    open_page: OpenPage, guarded: str, draw: Draw, tmp_path: Path
) -> None:
    large = tmp_path / "large.bmp"
    large.write_bytes(b"BM" + bytes(9000))
    driver = open_page(guarded, failures=True, ready=False)
    driver.page.wait_for_selector("#key-dialog[open]")
    driver.add(large)  # before the limits are known
    enter_key(driver)
    driver.wait()
    assert driver.text("#limits") == "Up to 4.0 kB and 0.02 million pixels per image."
    assert driver.text(".stage-message") == (
        "The image is 9.0 kB; this server accepts at most 4.0 kB. It was not sent."
    )
    assert driver.num_requests() == 0
    assert driver.states() == ["failed"]
    driver.upload(draw("wide.png", height=160, width=160))
    text = driver.text(".stage-message")
    assert text.startswith("The image is too large for this server: too many pixels: 160 x 160;")


def test_api_key_is_asked_for_and_kept(open_page: OpenPage, guarded: str, draw: Draw) -> None:
    driver = open_page(guarded, failures=True, ready=False)
    page = driver.page
    page.wait_for_selector("#key-dialog[open]")
    assert page.evaluate("() => document.activeElement.id") == "key"
    page.click("#key-later")
    assert "This server requires an API key." in driver.text("#pause")
    page.click("#resume")
    enter_key(driver, "wrong")
    page.wait_for_selector("#key-message.bad")
    assert "did not accept this key" in driver.text("#key-message")
    enter_key(driver)
    page.wait_for_selector("#model-facts dl")
    assert not page.is_visible("#pause")
    driver.upload(draw("one.png", (8, 8, RED)))
    assert driver.states() == ["1"]
    # The key outlives a reload, in this tab only.
    page.reload()
    page.wait_for_selector("#model-facts dl")
    assert page.evaluate("() => Object.values(sessionStorage)") == [KEY]
    assert page.evaluate("() => Object.values(localStorage)") == []


def test_api_key_asked_for_later_resumes_the_queue(failing: PageDriver, draw: Draw) -> None:
    failing.page.route(DETECT, lambda route: route.fulfill(status=401, json={"detail": "key"}))
    failing.add(*[draw(f"{n}.png", (8, 8, RED)) for n in range(4)])
    failing.page.wait_for_selector("#key-dialog[open]")
    failing.page.unroute(DETECT)
    enter_key(failing)
    failing.wait()
    assert failing.states() == ["1"] * 4


def test_busy_server_is_retried_after_its_delay(failing: PageDriver, draw: Draw) -> None:
    times = []

    def busy(route: Any) -> None:
        times.append(time.monotonic())
        if len(times) > 4:
            route.continue_()
        else:
            headers = {"Retry-After": "1"}
            route.fulfill(status=503, headers=headers, json={"detail": "full"})

    failing.page.route(DETECT, busy)
    failing.add(*[draw(f"{n}.png", (8, 8, RED)) for n in range(2)])
    failing.page.wait_for_selector("#pause:visible")
    assert failing.text("#pause p") == "The server is busy. Trying again in 1 s."
    assert failing.states() == ["waiting"] * 2
    failing.wait()
    assert failing.states() == ["1"] * 2
    assert not failing.page.is_visible("#pause")
    assert len(times) == 6
    assert times[2] - times[0] > 0.9
    assert times[4] - times[2] > 0.9


def test_offline_server_gets_no_uploads(failing: PageDriver, draw: Draw) -> None:
    failing.page.context.set_offline(True)
    failing.add(draw("one.png", (8, 8, RED)))
    failing.page.wait_for_selector("#pause:visible")
    failing.page.wait_for_timeout(1500)  # it requests the health check meanwhile
    assert failing.num_requests() == 1
    assert "The server does not respond." in failing.text("#pause")
    failing.page.context.set_offline(False)
    failing.page.click("#resume")
    failing.wait()
    assert failing.states() == ["1"]
    assert not failing.page.is_visible("#pause")


def test_closed_connection_fails_after_a_retry(failing: PageDriver, draw: Draw) -> None:
    failing.page.route(DETECT, lambda route: route.abort("connectionreset"))
    failing.upload(draw("one.png", (8, 8, RED)))
    assert "The server closed the connection during the upload" in failing.text(".stage-message")
    assert failing.num_requests() == 2


@pytest.mark.parametrize(
    ("status", "text"),
    [(503, "The server is busy."), (500, "The server does not list its models: ")],
)
def test_models_are_requested_until_the_server_responds(
    failing: PageDriver, draw: Draw, status: int, text: str
) -> None:
    page = failing.page
    headers = {"Retry-After": "30"}
    response = {"status": status, "headers": headers, "json": {"detail": "no"}}
    page.route("**/v1/model", lambda route: route.fulfill(**response))
    page.reload()
    page.wait_for_selector("#pause:visible")
    assert failing.text("#pause").startswith(text)
    # Images can be added before the models are known.
    failing.add(draw("one.png", (8, 8, RED)))
    assert failing.states() == ["waiting"]
    page.unroute("**/v1/model")
    page.evaluate("() => document.getElementById('resume').click()")
    failing.wait()
    assert failing.states() == ["1"]
