"""Clear words when something is refused, and what the page does about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_desk import GREEN, KEY, RED, Desk

Draw = Callable[..., Path]
OpenDesk = Callable[..., Desk]


@pytest.fixture
def stern(open_desk: OpenDesk) -> Desk:
    """A page whose requests may fail."""
    return open_desk(failures=True)


def unlock(desk: Desk, key: str = KEY) -> None:
    desk.page.fill("#key", key)
    desk.page.keyboard.press("Enter")


def test_a_broken_image(stern: Desk, draw: Draw, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(draw("whole.png", (8, 8, RED)).read_bytes()[:60])
    stern.choose(broken)
    words = stern.text(".stage-message")
    assert words.startswith("The image cannot be read: ")
    assert "broken.png" not in words  # the name stands above it
    assert stern.states() == ["failed"]
    assert "1 failed" in stern.text("#progress-text")
    assert words.count("cannot be read") == 1
    stern.said("broken.png: The image cannot be read: ")
    # The next ones are searched all the same.
    stern.choose(tmp_path / "whole.png")
    assert stern.states() == ["failed", "1"]
    assert stern.page.is_visible(".stage-message") is False


def test_each_refusal_has_its_words(stern: Desk, draw: Draw) -> None:
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
    stern.page.route(
        "**/v1/detect*",
        lambda one: one.fulfill(status=next(statuses), json={"detail": "Because."}),
    )
    stern.choose(draw("one.png", (8, 8, RED)))
    for words in told.values():
        assert stern.text(".stage-message") == f"{words} Try again"
        if words == "Because.":
            stern.page.unroute("**/v1/detect*")
        stern.page.click(".stage-message button")
        stern.wait()
    assert stern.states() == ["1"]


def test_answers_that_make_no_sense(stern: Desk, draw: Draw) -> None:
    unknown = [{"detections": [{"category_id": 1000, "box": []}]}]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"body": "<html>Bad gateway</html>", "status": 502}, "status 502"),
        ({"body": "hello"}, "The response is not JSON."),
        ({"json": {"images": []}}, "The response contains no image."),
        ({"json": {"images": unknown}}, "unknown category id 1000"),
    ]
    answers = iter(cases)
    stern.page.route("**/v1/detect*", lambda one: one.fulfill(**next(answers)[0]))
    for i, (_, words) in enumerate(cases):
        stern.choose(draw(f"{i}.png", (8, 8, RED)))
        assert words in stern.text(".stage-message")


def test_too_many_bytes_are_not_sent(open_desk: OpenDesk, guarded: str, tmp_path: Path) -> None:
    large = tmp_path / "large.bmp"
    large.write_bytes(b"BM" + bytes(9000))
    desk = open_desk(guarded, failures=True, opened=False)
    desk.page.goto(guarded)
    desk.page.wait_for_selector("#key-dialog[open]")
    desk.page.set_input_files("#files", str(large))  # before the limits are known
    unlock(desk)
    desk.page.wait_for_selector("#model-facts dl")
    desk.wait()
    assert desk.text("#limits") == "Up to 4.0 kB and 0.02 million pixels per image."
    assert desk.text(".stage-message") == (
        "The image is 9.0 kB; this server accepts at most 4.0 kB. It was not sent."
    )
    assert desk.asked() == 0
    assert desk.states() == ["failed"]


def test_too_many_pixels(open_desk: OpenDesk, guarded: str, draw: Draw) -> None:
    desk = open_desk(guarded, failures=True, opened=False)
    desk.page.goto(guarded)
    desk.page.wait_for_selector("#key-dialog[open]")
    unlock(desk)
    desk.page.wait_for_selector("#model-facts dl")
    desk.choose(draw("wide.png", height=160, width=160))
    words = desk.text(".stage-message")
    assert words.startswith("The image is too large for this server: ")
    assert "pixels" in words


def test_the_key(open_desk: OpenDesk, guarded: str, draw: Draw) -> None:
    desk = open_desk(guarded, failures=True, opened=False)
    page = desk.page
    page.goto(guarded)
    page.wait_for_selector("#key-dialog[open]")
    assert page.evaluate("() => document.activeElement.id") == "key"
    page.click("#key-later")
    assert "This server requires an API key." in desk.text("#message")
    # Another message does not make it forget.
    desk.transfer("paste")
    assert "There is no image in the clipboard." in desk.text("#message")
    page.click("#message-close")
    assert "This server requires an API key." in desk.text("#message")
    page.click("#message-action")
    unlock(desk, "wrong")
    page.wait_for_function("() => document.querySelector('#key-message.bad') !== null")
    assert "did not accept this key" in desk.text("#key-message")
    unlock(desk)
    page.wait_for_selector("#model-facts dl")
    assert not page.is_visible("#message")
    desk.choose(draw("one.png", (8, 8, RED)))
    assert desk.states() == ["1"]
    # It outlasts a reload, in this tab alone.
    page.reload()
    page.wait_for_selector("#model-facts dl")
    assert page.evaluate("() => Object.values(sessionStorage)") == [KEY]
    assert page.evaluate("() => Object.values(localStorage)") == []


def test_a_key_that_is_asked_for_later(stern: Desk, draw: Draw) -> None:
    """A server that was restarted with a key: what was given to it goes on with the key."""
    locked = "**/v1/detect*"
    stern.page.route(locked, lambda one: one.fulfill(status=401, json={"detail": "the key"}))
    files = [draw(f"{n}.png", (8, 8, RED)) for n in range(4)]
    stern.page.set_input_files("#files", [str(file) for file in files])
    stern.page.wait_for_selector("#key-dialog[open]")
    stern.page.unroute(locked)
    unlock(stern)
    stern.wait()
    assert stern.states() == ["1"] * 4


def test_a_busy_server_is_waited_for(stern: Desk, draw: Draw) -> None:
    times = []

    def busy(route: Any) -> None:
        times.append(time.monotonic())
        if len(times) > 4:
            route.continue_()
        else:
            headers = {"Retry-After": "1"}
            route.fulfill(status=503, headers=headers, json={"detail": "full"})

    stern.page.route("**/v1/detect*", busy)
    files = [draw(f"{n}.png", (8, 8, RED)) for n in range(2)]
    stern.page.set_input_files("#files", [str(file) for file in files])
    stern.page.wait_for_selector("#message.waiting")
    assert "The server is busy." in stern.text("#message")
    assert stern.text("#message-countdown") == "1 s"
    assert stern.states() == ["waiting"] * 2
    stern.wait()
    assert stern.states() == ["1"] * 2
    assert not stern.page.is_visible("#message")
    # Two refused, a second's wait, two refused, a second's wait, two taken.
    assert len(times) == 6
    assert times[2] - times[0] > 0.9
    assert times[4] - times[2] > 0.9


def test_a_server_that_is_away(stern: Desk, draw: Draw) -> None:
    stern.page.context.set_offline(True)
    stern.page.set_input_files("#files", str(draw("one.png", (8, 8, RED))))
    stern.page.wait_for_selector("#message.waiting")
    assert "The server does not respond." in stern.text("#message")
    # It asks whether anybody is there, and uploads nothing to nobody.
    stern.page.wait_for_timeout(1500)
    assert stern.asked() == 1
    assert "The server does not respond." in stern.text("#message")
    stern.page.context.set_offline(False)
    stern.page.click("#message-action")
    stern.wait()
    assert stern.states() == ["1"]
    assert not stern.page.is_visible("#message")


def test_a_server_that_hangs_up_on_one_image(stern: Desk, draw: Draw) -> None:
    stern.page.route("**/v1/detect*", lambda one: one.abort("connectionreset"))
    stern.choose(draw("one.png", (8, 8, RED)))
    assert "The server closed the connection during the upload" in stern.text(".stage-message")
    assert stern.asked() == 2


def test_a_file_that_is_gone(stern: Desk, draw: Draw) -> None:
    stern.page.context.set_offline(True)
    file = draw("one.png", (8, 8, GREEN))
    stern.page.set_input_files("#files", str(file))
    stern.page.wait_for_selector("#message.waiting")
    file.unlink()
    stern.page.context.set_offline(False)
    stern.page.click("#message-action")
    stern.wait()
    assert "The file can no longer be read" in stern.text(".stage-message")


def test_a_server_that_is_not_there_at_first(open_desk: OpenDesk, server: str, draw: Draw) -> None:
    desk = open_desk(failures=True, opened=False)
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

        desk.page.route(address, refuse)
        desk.page.goto(server)
        desk.page.wait_for_selector("#message.waiting")
        assert desk.text("#message").startswith(words)
        # Images may come before the models.
        desk.page.set_input_files("#files", str(draw("one.png", (8, 8, RED))))
        assert desk.states() == ["waiting"]
        desk.page.unroute(address)
        # By script: the page may retry by itself at any moment.
        desk.page.evaluate("() => document.getElementById('message-action').click()")
        desk.wait()
        assert desk.states() == ["1"]
