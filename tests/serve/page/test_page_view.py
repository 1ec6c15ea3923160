"""Filters of score and classes, highlighting, zoom, and two models side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from page_driver import BLUE, DIM_RED, GREEN, RED, PageDriver

Draw = Callable[..., Path]
OpenPage = Callable[..., PageDriver]

# Scores by brightness, half 150: 255 .9948, 200 .9241, 170 .7311, 110 .1192.
LADDER = [(8, 8, RED), (24, 8, (200, 0, 0)), (40, 8, (0, 170, 0)), (56, 8, DIM_RED)]


def test_score_filters_without_requests(driver: PageDriver, draw: Draw) -> None:
    page = driver.page
    driver.upload(draw("ladder.png", *LADDER))
    num_requests = driver.num_requests()
    assert len(driver.boxes()) == 3
    assert driver.text("#score-hint") == "Shown: 3 of 4 objects"
    assert page.get_attribute("#score", "min") == "0.05"  # the model's own threshold
    for score, number in ((0.05, 4), (0.73, 3), (0.74, 2)):
        driver.set_score(score)
        assert len(driver.boxes()) == number
    assert driver.states() == ["2"]
    assert driver.text("#score-number") == "0.74"
    assert page.locator(".detections label:visible").count() == 2
    driver.wait_for_announcement("ladder.png: 2 objects: 2 red")
    page.focus("#score")
    for _ in range(19):
        page.keyboard.press("ArrowRight")
    assert page.input_value("#score") == "0.93"
    assert driver.states() == ["1"]
    driver.set_score(1)
    assert "No score of 1.00 or more; 4 objects below." in driver.text(".stage-message")
    page.click(".stage-message button")
    driver.settle()
    assert len(driver.boxes()) == 4
    assert driver.num_requests() == num_requests


def test_classes_filter_without_requests(driver: PageDriver, draw: Draw) -> None:
    driver.upload(draw("three.png", (8, 8, RED), (24, 8, GREEN), (40, 8, GREEN), (56, 8, BLUE)))
    num_requests = driver.num_requests()
    page = driver.page
    assert driver.texts(".classes .count") == ["1", "2", "1"]
    page.get_by_role("checkbox", name="green 2").uncheck()
    driver.settle()
    assert driver.boxes() == [[8, 8, 16, 16], [56, 8, 64, 16]]
    assert driver.states() == ["2"]
    assert driver.texts(".classes .count") == ["1", "2", "1"]  # hidden classes are counted
    driver.wait_for_announcement("three.png: 2 objects")
    page.click("#none")
    driver.settle()
    assert driver.boxes() == []
    assert "All detected classes are hidden." in driver.text(".stage-message")
    page.click("#all")
    driver.settle()
    assert len(driver.boxes()) == 4
    assert driver.num_requests() == num_requests


def test_many_classes_are_sorted_by_detection(driver: PageDriver, draw: Draw) -> None:
    page = driver.page
    names = [*[f"thing {n}" for n in range(2, 31)], "red"]
    model = {"name": "colours", "classes": names, "thresholds": {"score_threshold": 0.05}}
    model |= {"metrics": None, "milliseconds": None, "network": "torch"}
    limits = {"bytes": 9e6, "pixels": 9e6}
    content = {"models": [model], "limits": limits, "version": "1"}
    page.route("**/v1/model", lambda route: route.fulfill(json=content))
    page.reload()
    page.wait_for_selector("#model-facts dl")
    driver.upload(draw("two.png", (8, 8, RED)))
    assert driver.texts("#classes .class-name")[:2] == ["red", "thing 2"]  # the detected first
    assert "not measured" in driver.text("#model-facts")


def test_hover_highlights_box_and_row(driver: PageDriver, draw: Draw) -> None:
    driver.upload(draw("two.png", (8, 8, RED), (64, 40, GREEN)))
    page = driver.page
    page.mouse.move(*driver.screen(68, 44))
    driver.settle()
    assert driver.active() == "green 0.99"
    assert driver.texts(".detections .active .class-name") == ["green"]
    assert driver.pixel(64.5, 44) == [255, 255, 255]  # its halo, within the box
    page.mouse.move(*driver.screen(40, 30))
    assert driver.active() is None
    page.locator(".detections label").first.hover()
    assert driver.active() == "red 0.99"


def test_highlighted_box_has_a_caption_in_a_crowd(driver: PageDriver, draw: Draw) -> None:
    driver.upload(draw("crowd.png", *[(8 * i, 8 * j, RED) for i in range(12) for j in range(8)]))
    assert len(driver.boxes()) == 96
    # The captions within the crowd would cover other objects.
    assert driver.pixel(44, 26) == [255, 0, 0]
    driver.page.mouse.move(*driver.screen(44, 36))
    driver.settle()
    assert driver.pixel(40.4, 28.5) == [213, 94, 0]  # the caption over the box at (40, 32)


def test_detections_can_be_reached_by_keyboard(driver: PageDriver, draw: Draw) -> None:
    driver.upload(draw("ladder.png", *LADDER))
    page = driver.page
    page.focus("#none")
    while page.evaluate("() => document.activeElement.name") != "detection-0":
        page.keyboard.press("Tab")
    assert driver.active() == "red 0.99"
    page.keyboard.press("ArrowDown")
    assert driver.active() == "red 0.92"
    page.keyboard.press("ArrowDown")
    assert driver.active() == "green 0.73"
    whole = driver.position()
    page.keyboard.press("Enter")
    assert driver.position() != whole
    page.keyboard.press("Escape")
    assert driver.position() == whole
    page.keyboard.press("Tab")  # leaves the list
    assert driver.active() is None
    # A click on a box selects its row, and arrows continue from it.
    page.mouse.click(*driver.screen(28, 12))
    page.mouse.move(0, 0)
    assert driver.active() == "red 0.92"
    page.keyboard.press("ArrowUp")
    assert driver.active() == "red 0.99"


def test_zoom_and_pan(driver: PageDriver, draw: Draw) -> None:
    driver.upload(draw("two.png", (16, 8, RED), (64, 40, GREEN)))
    page = driver.page
    whole = driver.position()

    def matches() -> bool:
        driver.settle()
        return driver.pixel(20, 12) == [255, 0, 0] and driver.pixel(40, 14) == [0, 0, 0]

    page.click("#zoom-in")
    assert driver.position()[0] == pytest.approx(1.4 * whole[0])
    assert matches()
    page.click("#full")
    assert driver.text("#zoom") == "100%"
    for key in "0++-":
        page.keyboard.press(key)
    assert driver.position()[0] == pytest.approx(1.4 * whole[0])
    page.keyboard.press("1")
    assert driver.position()[0] == 1
    page.keyboard.press("0")
    assert driver.position() == whole
    # The wheel zooms about the pointer.
    at = driver.screen(20, 12)
    page.mouse.move(*at)
    page.mouse.wheel(0, -1500)
    page.wait_for_function("(old) => document.getElementById('zoom').value !== old", arg="400%")
    assert matches()
    zoomed = driver.screen(20, 12)
    assert zoomed == pytest.approx(at, abs=8)  # pointer events have whole pixels: 1 is 9 here
    page.mouse.down()
    page.mouse.move(at[0] + 30, at[1] + 20, steps=4)
    page.mouse.up()
    assert driver.screen(20, 12) == pytest.approx((zoomed[0] + 30, zoomed[1] + 20), abs=1.5)
    assert matches()
    page.keyboard.press("Shift+ArrowRight")
    assert driver.screen(20, 12)[0] == pytest.approx(zoomed[0] - 30, abs=1.5)
    # A part of the image stays in sight.
    for _ in range(100):
        page.keyboard.press("Shift+ArrowRight")
    assert driver.screen(96, 64)[0] > page.locator(".stage").bounding_box()["x"] + 50
    page.keyboard.press("0")
    assert driver.position() == whole
    page.mouse.dblclick(*at)
    assert driver.position()[0] == pytest.approx(2.5 * whole[0])


def test_pinch_zooms_about_its_centre(open_page: OpenPage, draw: Draw) -> None:
    driver = open_page(has_touch=True)
    driver.upload(draw("one.png", (16, 8, RED)))
    scale = driver.position()[0]
    middle = driver.screen(48, 32)
    session = driver.page.context.new_cdp_session(driver.page)

    def touch(kind: str, *gaps: int) -> None:
        points = [
            {"x": middle[0] + sign * gap, "y": middle[1], "id": n}
            for gap in gaps
            for n, sign in enumerate((-1, 1))
        ]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", 40)
    for gap in (50, 60, 70, 80):
        touch("touchMove", gap)
    touch("touchEnd")
    # The first steps are needed to distinguish a pinch from a tap.
    assert driver.position()[0] == pytest.approx(2 * scale, rel=0.15)
    assert driver.screen(48, 32) == pytest.approx(middle, abs=12)
    driver.page.touchscreen.tap(*driver.screen(20, 12))
    assert driver.active() == "red 0.99"


def test_two_models_share_zoom_and_filter(driver: PageDriver, draw: Draw) -> None:
    """Scores by brightness: 255 .9948 and .9627, 200 .9241 and .6225, 170 .7311 and .2689."""
    driver.upload(draw("ladder.png", *LADDER, (72, 8, BLUE)))
    page = driver.page
    page.select_option("#second-model", "strict")
    driver.wait()
    assert [len(driver.boxes(pane)) for pane in (0, 1)] == [4, 3]
    assert driver.states() == ["4 | 3"]
    assert driver.texts(".pane-title") == ["colours · 4 objects", "strict · 3 objects"]
    rows = zip(driver.texts(".classes .class-name"), driver.texts(".classes .count"), strict=True)
    assert dict(rows) == {
        "red": "2 | 2 ±0",
        "green": "1 | 0 −1",
        "<i>blue</i>": "1 | 0 −1",
        "violet": "0 | 1 +1",
    }
    driver.wait_for_announcement(
        "colours: 4 objects: 2 red, 1 <i>blue</i>, 1 green; strict: 3 objects: 2 red, 1 violet"
    )
    scale = driver.position()[0]
    stage = page.locator(".stage").nth(1).bounding_box()
    page.mouse.move(stage["x"] + 50, stage["y"] + 60)
    page.mouse.wheel(0, -300)
    page.wait_for_timeout(100)
    assert driver.position()[0] > scale
    page.get_by_role("checkbox", name="red 2 | 2").uncheck()
    driver.settle()
    assert [len(driver.boxes(pane)) for pane in (0, 1)] == [2, 1]
    num_requests = driver.num_requests()
    page.select_option("#second-model", "")
    driver.settle()
    assert page.locator(".pane").count() == 1
    page.select_option("#first-model", "strict")
    driver.wait()
    assert driver.states() == ["1"]
    assert driver.num_requests() == num_requests  # the results of both models are kept
    assert page.title() == "strict · retinanet"


def test_class_has_the_same_colour_everywhere(driver: PageDriver, draw: Draw) -> None:
    driver.upload(draw("two.png", (8, 8, RED), (24, 8, BLUE)))
    page = driver.page
    for first, colour in (
        ("colours", [0, 114, 178]),  # the sixth, after red, green, blue, violet and rose
        ("strict", [204, 121, 167]),  # the fifth, after red, green, violet and rose
    ):
        page.select_option("#first-model", first)
        page.select_option("#second-model", "other")
        driver.wait()
        background = "(e) => getComputedStyle(e).backgroundColor"
        row = page.locator(".detections").nth(1).locator("label", has_text="sky")
        checkbox = page.locator(".classes li", has_text="sky")
        for item in (row, checkbox):
            css = item.locator(".swatch").evaluate(background)
            assert css == f"rgb({', '.join(map(str, colour))})"
        page.select_option("#second-model", "")
        page.select_option("#first-model", "other")
        page.select_option("#second-model", first)
