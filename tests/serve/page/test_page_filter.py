"""Score and classes filter on the page; hover, focus, zoom, and two models side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_driver import BLUE, DIM_RED, GREEN, RED, PageDriver

Draw = Callable[..., Path]
OpenPage = Callable[..., PageDriver]

# Scores by brightness, half 150: 255 .9948, 200 .9241, 170 .7311, 110 .1192.
LADDER = [(8, 8, RED), (24, 8, (200, 0, 0)), (40, 8, (0, 170, 0)), (56, 8, DIM_RED)]


def test_score_slider_filters_without_requests(driver: PageDriver, draw: Draw) -> None:
    driver.upload(draw("ladder.png", *LADDER))
    num_requests = driver.num_requests()
    assert len(driver.boxes()) == 3
    assert driver.text("#score-hint") == "Shown: 3 of 4 objects"
    # The slider begins where the model's answers begin.
    assert driver.page.get_attribute("#score", "min") == "0.05"
    driver.set_score(0.05)
    assert len(driver.boxes()) == 4
    driver.set_score(0.73)
    assert len(driver.boxes()) == 3
    driver.set_score(0.74)
    assert driver.boxes() == [[8, 8, 16, 16], [24, 8, 32, 16]]
    assert driver.states() == ["2"]
    assert driver.page.input_value("#score-number") == "0.74"
    assert driver.page.locator(".detections li:not(.off)").count() == 2
    driver.wait_for_announcement("ladder.png: 2 objects: 2 red")
    driver.page.focus("#score")
    for _ in range(19):
        driver.page.keyboard.press("ArrowRight")
    assert driver.page.input_value("#score") == "0.93"
    driver.settle()
    assert driver.states() == ["1"]
    driver.page.fill("#score-number", "1")
    driver.settle()
    assert "No score of 1.00 or more; 4 objects below." in driver.text(".stage-message")
    driver.page.click(".stage-message button")
    driver.settle()
    assert len(driver.boxes()) == 4
    assert driver.num_requests() == num_requests


def test_class_checkboxes_filter_without_requests(driver: PageDriver, draw: Draw) -> None:
    driver.upload(draw("three.png", (8, 8, RED), (24, 8, GREEN), (40, 8, GREEN), (56, 8, BLUE)))
    num_requests = driver.num_requests()
    page = driver.page
    assert page.locator(".classes .count").all_inner_texts() == ["1", "2", "1"]
    page.get_by_role("checkbox", name="green 2").uncheck()
    driver.settle()
    assert driver.boxes() == [[8, 8, 16, 16], [56, 8, 64, 16]]
    assert driver.states() == ["2"]
    # What is switched off is still counted beside its name.
    assert page.locator(".classes .count").all_inner_texts() == ["1", "2", "1"]
    driver.wait_for_announcement("three.png: 2 objects")
    page.click("#none")
    driver.settle()
    assert driver.boxes() == []
    assert "All detected classes are hidden." in driver.text(".stage-message")
    page.click("#all")
    driver.settle()
    assert len(driver.boxes()) == 4
    assert driver.num_requests() == num_requests


def test_many_classes_can_be_searched(
    driver: PageDriver, draw: Draw, ask: Callable[..., Any]
) -> None:
    file = draw("two.png", (8, 8, RED))
    names = ["red", *[f"thing {n}" for n in range(2, 31)]]
    model = {"name": "colours", "default": True, "classes": names, "category_ids": []}
    model |= {"thresholds": {"score_threshold": 0.05}, "metrics": None, "milliseconds": None}
    model["category_ids"] = [3, *range(102, 131)]
    page = driver.page
    page.route("**/v1/model", lambda route: route.fulfill(json={"models": [model], "limits": {}}))
    driver.open()
    driver.upload(file)
    assert page.locator("#classes .class-name").all_inner_texts() == ["red"]
    assert driver.text("#absent-summary") == "29 classes not in this image"
    page.fill("#class-search", "thing 3")
    assert page.locator("#absent-classes .class-name").all_inner_texts() == ["thing 3", "thing 30"]
    page.click("#none")
    assert page.locator("#absent-classes input:checked").count() == 0
    page.fill("#class-search", "")
    assert page.locator(".classes input:not(:checked)").count() == 2
    assert "not measured" in driver.text("#model-facts")


def test_hover_highlights_box_and_list(driver: PageDriver, draw: Draw) -> None:
    driver.upload(draw("two.png", (8, 8, RED), (64, 40, GREEN)))
    page = driver.page
    page.mouse.move(*driver.screen(68, 44))
    driver.settle()
    assert page.locator(".box.active").get_attribute("aria-label") == (
        "green, score 0.99, 8 by 8 pixels at 64, 40"
    )
    assert page.locator(".caption.active text").text_content() == "green 0.99"
    assert page.locator(".detections li[aria-selected=true] .class-name").inner_text() == "green"
    page.mouse.move(*driver.screen(40, 30))
    assert page.locator(".box.active").count() == 0
    # And from the list to the image.
    page.locator(".detections li").first.hover()
    assert page.locator(".box.active").get_attribute("aria-label").startswith("red")


def test_active_box_has_a_caption_in_a_crowd(driver: PageDriver, draw: Draw) -> None:
    """Where objects crowd, captions give way; the one pointed at has its own."""
    squares = [(8 * i, 8 * j, RED) for i in range(12) for j in range(8)]
    driver.upload(draw("crowd.png", *squares))
    page = driver.page
    shown = page.locator(".caption:not(.off)").count()
    assert len(driver.boxes()) == 96
    assert shown < 96
    for _ in range(10):
        page.mouse.move(*driver.screen(8 * _ + 4, 36))
        driver.settle()
        assert page.locator(".caption.active:not(.off)").count() == 1


def test_detections_can_be_reached_by_keyboard(driver: PageDriver, draw: Draw) -> None:
    driver.upload(draw("ladder.png", *LADDER))
    page = driver.page
    page.focus("#remove")
    page.keyboard.press("Tab")
    label = "() => document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(label).startswith("red, score 0.99")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(label).startswith("red, score 0.92")
    driver.settle()
    assert page.locator(".caption.active text").text_content() == "red 0.92"
    page.keyboard.press("End")
    assert page.evaluate(label).startswith("green, score 0.73")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(label).startswith("green, score 0.73")
    before = driver.text("#zoom")
    page.keyboard.press("Enter")
    assert driver.text("#zoom") != before
    page.keyboard.press("Escape")
    assert driver.text("#zoom") == before
    # One Tab leaves the boxes, however many there are.
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.closest('.box')") is None
    assert page.locator(".box.active").count() == 0
    page.focus(".detections")
    assert page.locator(".box.active").get_attribute("aria-label").startswith("red, score 0.99")
    page.keyboard.press("ArrowDown")
    active = page.get_attribute(".detections", "aria-activedescendant")
    assert page.locator(f"#{active}").text_content() == "red8 × 8 pixels, score 0.92"
    assert page.locator(".box.active").get_attribute("aria-label").startswith("red, score 0.92")
    page.keyboard.press("Enter")
    assert driver.text("#zoom") != before


def test_zoom_and_pan_keep_boxes_on_the_image(driver: PageDriver, draw: Draw) -> None:
    driver.upload(draw("two.png", (16, 8, RED), (64, 40, GREEN)))
    page = driver.page

    def agrees() -> bool:
        driver.settle()
        return driver.pixel(20, 12) == [255, 0, 0] and driver.pixel(40, 12) == [0, 0, 0]

    whole = page.evaluate("() => document.querySelector('.boxes').getAttribute('transform')")
    zoom = int(driver.text("#zoom").rstrip("%"))
    page.click("#zoom-in")
    assert int(driver.text("#zoom").rstrip("%")) == pytest.approx(1.4 * zoom, abs=1)
    assert agrees()
    page.click("#full")
    assert driver.text("#zoom") == "100%"
    page.keyboard.press("0")
    page.keyboard.press("+")
    page.keyboard.press("+")
    page.keyboard.press("-")
    assert int(driver.text("#zoom").rstrip("%")) == pytest.approx(1.4 * zoom, abs=1)
    page.keyboard.press("1")
    assert driver.text("#zoom") == "100%"
    page.keyboard.press("0")
    driver.settle()
    assert page.locator(".boxes").get_attribute("transform") == whole
    # The wheel zooms about the pointer: what is under it stays there.
    at = driver.screen(20, 12)
    page.mouse.move(*at)
    page.mouse.wheel(0, -1500)
    page.wait_for_function("(old) => document.getElementById('zoom').value !== old", arg=f"{zoom}%")
    assert agrees()
    assert driver.screen(20, 12) == pytest.approx(at, abs=1)
    page.mouse.down()
    page.mouse.move(at[0] + 30, at[1] + 20, steps=4)
    page.mouse.up()
    driver.settle()
    assert driver.screen(20, 12) == pytest.approx((at[0] + 30, at[1] + 20), abs=1.5)
    assert agrees()
    page.keyboard.press("Shift+ArrowRight")
    driver.settle()
    assert driver.screen(20, 12)[0] == pytest.approx(at[0] - 30, abs=1.5)
    # However far it is pushed, some of the image stays in sight.
    for _ in range(100):
        page.keyboard.press("Shift+ArrowRight")
    driver.settle()
    right = driver.screen(96, 64)[0]
    assert right > page.locator(".stage").bounding_box()["x"] + 50
    page.keyboard.press("0")
    driver.settle()
    assert page.locator(".boxes").get_attribute("transform") == whole
    page.mouse.dblclick(*at)
    assert int(driver.text("#zoom").rstrip("%")) == pytest.approx(2.5 * zoom, abs=2)


def test_pinch_zooms_about_its_centre(open_page: OpenPage, draw: Draw) -> None:
    driver = open_page(has_touch=True)
    driver.upload(draw("one.png", (16, 8, RED)))
    zoom = int(driver.text("#zoom").rstrip("%"))
    middle = driver.screen(48, 32)
    session = driver.page.context.new_cdp_session(driver.page)

    def touch(kind: str, *apart: int) -> None:
        points = [
            {"x": middle[0] + sign * gap, "y": middle[1], "id": n}
            for gap in apart
            for n, sign in enumerate((-1, 1))
        ]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", 40)
    for gap in (50, 60, 70, 80):
        touch("touchMove", gap)
    touch("touchEnd")
    driver.settle()
    # The first steps go into telling a pinch from a tap.
    assert int(driver.text("#zoom").rstrip("%")) == pytest.approx(2 * zoom, rel=0.15)
    assert driver.screen(48, 32) == pytest.approx(middle, abs=12)
    driver.page.touchscreen.tap(*driver.screen(20, 12))
    driver.settle()
    assert driver.page.locator(".caption.active text").text_content() == "red 0.99"


def test_two_models_share_zoom_and_filter(driver: PageDriver, draw: Draw) -> None:
    """By brightness: 255 .9948 and .9627, 200 .9241 and .6225, 170 .7311 and .2689 (half 190)."""
    driver.upload(draw("ladder.png", *LADDER, (72, 8, BLUE)))
    page = driver.page
    page.select_option("#second-model", "strict")
    driver.wait()
    assert [len(driver.boxes(pane)) for pane in (0, 1)] == [4, 3]
    assert driver.states() == ["4 | 3"]
    assert page.locator(".pane-title").all_inner_texts() == [
        "colours · 4 objects",
        "strict · 3 objects",
    ]
    rows = page.eval_on_selector_all(
        "#difference tr", "(rows) => rows.map((row) => [...row.cells].map((c) => c.textContent))"
    )
    assert rows == [
        ["class", "colours", "strict", "difference"],
        ["red", "2", "2", "0"],
        ["green", "1", "0", "−1"],
        ["<i>blue</i>", "1", "0", "−1"],
        ["violet", "0", "1", "+1"],
        ["all", "4", "3", "−1"],
    ]
    driver.wait_for_announcement(
        "colours: 4 objects: 2 red, 1 <i>blue</i>, 1 green; strict: 3 objects: 2 red, 1 violet"
    )
    # One zoom for both.
    page.keyboard.press("+")
    stage = page.locator(".stage").nth(1).bounding_box()
    page.mouse.move(stage["x"] + 50, stage["y"] + 60)
    page.mouse.wheel(0, -300)
    driver.settle()
    views = page.eval_on_selector_all(
        ".boxes", "(all) => all.map((e) => e.getAttribute('transform'))"
    )
    assert views[0] == views[1]
    # The filter holds for both, and is said once more.
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
    assert driver.num_requests() == num_requests  # both answers are kept
    assert page.title() == "strict · retinanet"


def test_class_has_the_same_colour_everywhere(driver: PageDriver, draw: Draw) -> None:
    """A class has one colour on the image, in its list and beside its toggle."""
    driver.upload(draw("two.png", (8, 8, RED), (24, 8, BLUE)))
    page = driver.page

    def colours() -> list[str]:
        driver.wait()
        stroke = "(e) => getComputedStyle(e).stroke"
        paint = "(e) => getComputedStyle(e).backgroundColor"
        pane = page.locator(".pane").nth(1)
        row = page.locator(".detections").nth(1).locator("li", has_text="sky")
        toggle = page.locator(".classes li", has_text="sky")
        return [
            pane.locator(".box[aria-label^=sky] .line").evaluate(stroke),
            row.locator(".swatch").evaluate(paint),
            toggle.locator(".swatch").evaluate(paint),
        ]

    page.select_option("#second-model", "other")
    sixth = colours()  # after red, green, blue, violet and rose
    assert sixth == ["rgb(0, 114, 178)"] * 3
    page.select_option("#first-model", "strict")
    fifth = colours()  # after red, green, violet and rose
    assert fifth == ["rgb(204, 121, 167)"] * 3
