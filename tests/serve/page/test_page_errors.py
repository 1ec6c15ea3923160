"""Clear words when something is refused, and what the page does about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_driver import GREEN, KEY, RED, PageDriver

Draw = Callable[..., Path]
OpenPage = Callable[..., PageDriver]


@pytest.fixture
def failing(open_page: OpenPage) -> PageDriver:
    """A page whose requests may fail."""
    return open_page(failures=True)


def unlock(driver: PageDriver, key: str = KEY) -> None:
    driver.page.fill("#key", key)
    driver.page.keyboard.press("Enter")


def test_broken_image_is_explained(failing: PageDriver, draw: Draw, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(draw("whole.png", (8, 8, RED)).read_bytes()[:60])
    failing.upload(broken)
    words = failing.text(".stage-message")
    assert words.startswith("The image cannot be read: ")
    assert "broken.png" not in words  # the name stands above it
    assert failing.states() == ["failed"]
    assert "1 failed" in failing.text("#progress-text")
    assert words.count("cannot be read") == 1
    failing.wait_for_announcement("broken.png: The image cannot be read: ")
    # The next ones are searched all the same.
    failing.upload(tmp_path / "whole.png")
    assert failing.states() == ["failed", "1"]
    assert failing.page.is_visible(".stage-message") is False


def test_every_status_is_explained(failing: PageDriver, draw: Draw) -> None:
    told = {
        400: "The server rejected the request: Because.",
        404: "The server does not know this model: Because.",
        408: "The upload took too long: Because.",
        413: "The image is too large for this server: Because.",
        415: "The server does not accept this type of file: Because.",
        422: "The image cannot be read: Because.",
        500: "The server failed on this image: Because.",
        504: "The server took too long for this image: Because.",
        418: "Because.",
    }
    statuses = iter(told)
    failing.page.route(
        "**/v1/detect*",
        lambda one: one.fulfill(status=next(statuses), json={"detail": "Because."}),
    )
    failing.upload(draw("one.png", (8, 8, RED)))
    for words in told.values():
        assert failing.text(".stage-message") == f"{words} Try again"
        if words == "Because.":
            failing.page.unroute("**/v1/detect*")
        failing.page.click(".stage-message button")
        failing.wait()
    assert failing.states() == ["1"]


def test_invalid_responses_are_explained(failing: PageDriver, draw: Draw) -> None:
    unknown = [{"detections": [{"category_id": 1000, "box": []}]}]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"body": "<html>Bad gateway</html>", "status": 502}, "status 502"),
        ({"body": "hello"}, "The response is not JSON."),
        ({"json": {"images": []}}, "The response contains no image."),
        ({"json": {"images": unknown}}, "unknown category id 1000"),
    ]
    answers = iter(cases)
    failing.page.route("**/v1/detect*", lambda one: one.fulfill(**next(answers)[0]))
    for i, (_, words) in enumerate(cases):
        failing.upload(draw(f"{i}.png", (8, 8, RED)))
        assert words in failing.text(".stage-message")


def test_file_over_the_limit_is_not_sent(open_page: OpenPage, guarded: str, tmp_path: Path) -> None:
    large = tmp_path / "large.bmp"
    large.write_bytes(b"BM" + bytes(9000))
    driver = open_page(guarded, failures=True, opened=False)
    driver.page.goto(guarded)
    driver.page.wait_for_selector("#key-dialog[open]")
    driver.page.set_input_files("#files", str(large))  # before the limits are known
    unlock(driver)
    driver.page.wait_for_selector("#model-facts dl")
    driver.wait()
    assert driver.text("#limits") == "Up to 4.0 kB and 0.02 million pixels per image."
    assert driver.text(".stage-message") == (
        "The image is 9.0 kB; this server accepts at most 4.0 kB. It was not sent."
    )
    assert driver.num_requests() == 0
    assert driver.states() == ["failed"]


def test_image_with_too_many_pixels_is_explained(
    open_page: OpenPage, guarded: str, draw: Draw
) -> None:
    driver = open_page(guarded, failures=True, opened=False)
    driver.page.goto(guarded)
    driver.page.wait_for_selector("#key-dialog[open]")
    unlock(driver)
    driver.page.wait_for_selector("#model-facts dl")
    driver.upload(draw("wide.png", height=160, width=160))
    words = driver.text(".stage-message")
    assert words.startswith("The image is too large for this server: ")
    assert "pixels" in words


def test_api_key_is_asked_for_and_kept(open_page: OpenPage, guarded: str, draw: Draw) -> None:
    driver = open_page(guarded, failures=True, opened=False)
    page = driver.page
    page.goto(guarded)
    page.wait_for_selector("#key-dialog[open]")
    assert page.evaluate("() => document.activeElement.id") == "key"
    page.click("#key-later")
    assert "This server requires an API key." in driver.text("#message")
    # Another message does not make it forget.
    driver.transfer("paste")
    assert "There is no image in the clipboard." in driver.text("#message")
    page.click("#message-close")
    assert "This server requires an API key." in driver.text("#message")
    page.click("#message-action")
    unlock(driver, "wrong")
    page.wait_for_function("() => document.querySelector('#key-message.bad') !== null")
    assert "did not accept this key" in driver.text("#key-message")
    unlock(driver)
    page.wait_for_selector("#model-facts dl")
    assert not page.is_visible("#message")
    driver.upload(draw("one.png", (8, 8, RED)))
    assert driver.states() == ["1"]
    # It outlasts a reload, in this tab alone.
    page.reload()
    page.wait_for_selector("#model-facts dl")
    assert page.evaluate("() => Object.values(sessionStorage)") == [KEY]
    assert page.evaluate("() => Object.values(localStorage)") == []


def test_api_key_asked_for_later_resumes_the_queue(failing: PageDriver, draw: Draw) -> None:
    """A server that was restarted with a key: what was given to it goes on with the key."""
    locked = "**/v1/detect*"
    failing.page.route(locked, lambda one: one.fulfill(status=401, json={"detail": "the key"}))
    files = [draw(f"{n}.png", (8, 8, RED)) for n in range(4)]
    failing.page.set_input_files("#files", [str(file) for file in files])
    failing.page.wait_for_selector("#key-dialog[open]")
    failing.page.unroute(locked)
    unlock(failing)
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

    failing.page.route("**/v1/detect*", busy)
    files = [draw(f"{n}.png", (8, 8, RED)) for n in range(2)]
    failing.page.set_input_files("#files", [str(file) for file in files])
    failing.page.wait_for_selector("#message.waiting")
    assert "The server is busy." in failing.text("#message")
    assert failing.text("#message-countdown") == "1 s"
    assert failing.states() == ["waiting"] * 2
    failing.wait()
    assert failing.states() == ["1"] * 2
    assert not failing.page.is_visible("#message")
    # Two refused, a second's wait, two refused, a second's wait, two taken.
    assert len(times) == 6
    assert times[2] - times[0] > 0.9
    assert times[4] - times[2] > 0.9


def test_offline_server_gets_no_uploads(failing: PageDriver, draw: Draw) -> None:
    failing.page.context.set_offline(True)
    failing.page.set_input_files("#files", str(draw("one.png", (8, 8, RED))))
    failing.page.wait_for_selector("#message.waiting")
    assert "The server does not respond." in failing.text("#message")
    # It asks whether anybody is there, and uploads nothing to nobody.
    failing.page.wait_for_timeout(1500)
    assert failing.num_requests() == 1
    assert "The server does not respond." in failing.text("#message")
    failing.page.context.set_offline(False)
    failing.page.click("#message-action")
    failing.wait()
    assert failing.states() == ["1"]
    assert not failing.page.is_visible("#message")


def test_closed_connection_fails_after_a_retry(failing: PageDriver, draw: Draw) -> None:
    failing.page.route("**/v1/detect*", lambda one: one.abort("connectionreset"))
    failing.upload(draw("one.png", (8, 8, RED)))
    assert "The server closed the connection during the upload" in failing.text(".stage-message")
    assert failing.num_requests() == 2


def test_deleted_file_is_explained(failing: PageDriver, draw: Draw) -> None:
    failing.page.context.set_offline(True)
    file = draw("one.png", (8, 8, GREEN))
    failing.page.set_input_files("#files", str(file))
    failing.page.wait_for_selector("#message.waiting")
    file.unlink()
    failing.page.context.set_offline(False)
    failing.page.click("#message-action")
    failing.wait()
    assert "The file can no longer be read" in failing.text(".stage-message")


def test_models_are_requested_until_the_server_responds(
    open_page: OpenPage, server: str, draw: Draw
) -> None:
    driver = open_page(failures=True, opened=False)
    address = "**/v1/model"
    for status, words in (
        (0, "The server does not respond."),
        (503, "The server is not ready yet."),
        (500, "The server does not list its models: "),
    ):

        def refuse(route: Any, _: Any, status: int = status) -> None:
            if status == 0:
                route.abort()
            else:
                route.fulfill(status=status, headers={"Retry-After": "30"}, json={"detail": "no"})

        driver.page.route(address, refuse)
        driver.page.goto(server)
        driver.page.wait_for_selector("#message.waiting")
        assert driver.text("#message").startswith(words)
        # Images may come before the models.
        driver.page.set_input_files("#files", str(draw("one.png", (8, 8, RED))))
        assert driver.states() == ["waiting"]
        driver.page.unroute(address)
        # By script: the page may retry by itself at any moment.
        driver.page.evaluate("() => document.getElementById('message-action').click()")
        driver.wait()
        assert driver.states() == ["1"]
